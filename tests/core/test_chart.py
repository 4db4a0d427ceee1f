"""The chart of strength over the sampling."""

import numpy as np
from controlnext_core.chart import AREA, draw_chart


def area(strengths) -> np.ndarray:
    """Rows of each column that are filled between the line and 0."""
    return (draw_chart(strengths) == AREA).all(axis=2).sum(axis=0)


def test_the_filled_area_follows_the_strength():
    columns = area([0.25] * 500 + [0.75] * 501)
    left, right = columns[120], columns[290]
    assert abs(right / left - 3) < 0.3


def test_a_strength_above_1_raises_the_scale():
    assert area([2.0] * 10 + [1.0] * 10)[290] < area([1.0] * 20)[290] * 0.6


def test_a_negative_strength_goes_below_the_zero_line():
    picture = draw_chart([-1.0] * 10)
    rows = np.flatnonzero((picture[:, 200] == AREA).all(axis=1))
    assert rows.min() > 60 and rows.max() > 120
