"""The chart of strength over the sampling."""

import pytest


@pytest.fixture
def area(pack):
    """area(strengths): rows of each column that are filled between the line and 0."""
    chart = pack("nodes.chart")
    return lambda strengths: (chart.draw_chart(strengths) == chart.AREA).all(axis=2).sum(axis=0)


def test_the_filled_area_follows_the_strength(area):
    columns = area([0.25] * 500 + [0.75] * 501)
    left, right = columns[120], columns[290]
    assert abs(right / left - 3) < 0.3


def test_a_strength_above_1_raises_the_scale(area):
    assert area([2.0] * 10 + [1.0] * 10)[290] < area([1.0] * 20)[290] * 0.6
