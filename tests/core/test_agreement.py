import numpy as np
import pytest

from demo_model.agreement import drawn_region, edge_f1, iou, share_of_the_way


def line(row: int) -> np.ndarray:
    edges = np.zeros((32, 32), bool)
    edges[row, 4:28] = True
    return edges


@pytest.mark.parametrize(("distance", "expected"), [(0, 1.0), (1, 1.0), (2, 0.0)])
def test_an_edge_counts_as_found_within_one_pixel(distance, expected):
    assert edge_f1(line(10), line(10 + distance)) == pytest.approx(expected)


def test_edges_that_the_control_lacks_and_edges_that_are_missing_cost_the_same():
    both = line(5) | line(20)
    assert edge_f1(both, line(5)) == edge_f1(line(5), both) == pytest.approx(2 / 3)


def test_no_edges_at_all_agree_with_nothing():
    assert edge_f1(np.zeros((32, 32), bool), line(5)) == 0


def test_white_inside_a_drawing_belongs_to_it():
    picture = np.full((32, 32, 3), 255, np.uint8)
    picture[8:24, 8:24] = (200, 30, 30)
    picture[12:20, 12:20] = 255
    region = drawn_region(picture)
    assert region.sum() == 16 * 16 and region[15, 15] and not region[0, 0]


def test_iou_is_the_shared_part_of_two_regions():
    one, other = np.zeros((2, 8, 8), bool)
    one[:, :4], other[:, 2:6] = True, True
    assert iou(one, other) == pytest.approx(2 / 6)


def test_the_share_of_the_way_is_0_at_off_and_1_at_the_ceiling():
    assert [share_of_the_way(on, off=0.4, ceiling=0.9) for on in (0.4, 0.65, 0.9)] == pytest.approx([0, 0.5, 1])
