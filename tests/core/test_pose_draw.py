import json

import cv2
import numpy as np
import pytest

from controlnext_core.pose_draw import draw_pose
from controlnext_core.pose_keypoints import BODY, FACE, LEFT_HAND, POINT_COUNTS, RIGHT_HAND, Frame, read_pose_keypoints


def person(**parts):
    """A person of the given parts: lists of (point, x, y, score) on a canvas of 0 to 1."""
    names = {"body": BODY, "face": FACE, "left_hand": LEFT_HAND, "right_hand": RIGHT_HAND}
    points = {part: np.zeros((count, 3)) for part, count in POINT_COUNTS.items()}
    for part, placed in parts.items():
        for index, *point in placed:
            points[names[part]][index] = point
    return points


def draw(*people, size=1080, **kwargs):
    return draw_pose(Frame(size, size, list(people)), size, size, **kwargs)


def pixel(picture, x, y):
    return picture[int(y * len(picture)), int(x * len(picture))].tolist()


def test_every_pixel_equals_the_reference_implementations_pictures(goldens):
    files = sorted(goldens.folder.glob("pose/*.png"))
    assert files
    for file in files:
        (frame,) = read_pose_keypoints(json.loads(file.with_suffix(".json").read_text()), "keypoints")
        expected = cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB)
        drawn = draw_pose(frame, expected.shape[1], expected.shape[0])
        seen = drawn.any(axis=2) | expected.any(axis=2)
        assert (np.abs(drawn.astype(int) - expected).max(axis=2) <= 1)[seen].mean() >= 0.999, file.name


def test_red_and_blue_are_swapped_in_the_trained_look_only():
    right_shoulder_limb = person(body=[(1, 0.2, 0.5, 1), (2, 0.8, 0.5, 1)])
    assert pixel(draw(right_shoulder_limb), 0.5, 0.5) == [0, 0, 153]
    assert pixel(draw(right_shoulder_limb, colors="openpose"), 0.5, 0.5) == [153, 0, 0]
    hand = person(left_hand=[(0, 0.5, 0.5, 1)])
    assert pixel(draw(hand), 0.5, 0.5) == [255, 0, 0]
    assert pixel(draw(hand, colors="openpose"), 0.5, 0.5) == [0, 0, 255]


def test_openpose_look_has_dimmed_limbs_full_joints_and_white_faces():
    figure = person(body=[(8, 0.2, 0.5, 0.4), (9, 0.8, 0.5, 0.4)], face=[(30, 0.5, 0.2, 0.4)])
    picture = draw(figure, colors="openpose")
    assert pixel(picture, 0.5, 0.5) == [0, 153, 51]
    assert pixel(picture, 0.2, 0.5) == [0, 255, 170]
    assert pixel(picture, 0.5, 0.2) == [255, 255, 255]


def test_limbs_need_a_score_of_at_least_0_3_and_joints_more():
    below, at = (person(body=[(1, 0.2, 0.5, score), (2, 0.8, 0.5, 1)]) for score in (0.299, 0.3))
    assert not draw(below)[540, 400:650].any()
    assert draw(at)[540, 400:650].any()
    lone = person(body=[(1, 0.5, 0.5, 0.3)])
    assert not draw(lone).any()


def test_hands_and_faces_have_no_threshold_in_the_trained_look_and_one_in_the_usual():
    doubtful = person(right_hand=[(0, 0.3, 0.3, 0.2), (1, 0.7, 0.3, 0.9)], face=[(0, 0.5, 0.6, 0.2)])
    trained, usual = draw(doubtful), draw(doubtful, colors="openpose")
    for x, y in ((0.3, 0.3), (0.5, 0.3), (0.5, 0.6)):
        assert any(pixel(trained, x, y))
        assert not any(pixel(usual, x, y))


def test_scores_above_1_are_drawn_in_full_colour():
    figure = person(body=[(1, 0.2, 0.5, 1.4), (2, 0.8, 0.5, 1.4)], face=[(0, 0.5, 0.2, 1.4)])
    assert pixel(draw(figure), 0.5, 0.2) == [255, 255, 255]
    assert draw(figure).max(axis=(0, 1)).tolist() == [255, 255, 255]


def test_points_that_were_not_found_are_not_drawn():
    hand = person(left_hand=[(1, 0.5, 0.5, 1)], body=[(0, 0.5, 0.2, 1)])
    for colors in ("controlnext", "openpose"):
        assert not draw(hand, colors=colors)[:50, :50].any()


def test_each_part_can_be_left_out():
    figure = person(body=[(0, 0.2, 0.5, 1)], left_hand=[(0, 0.5, 0.5, 1)], face=[(0, 0.8, 0.5, 1)])
    places = {"draw_body": 0.2, "draw_hands": 0.5, "draw_face": 0.8}
    for left_out in places:
        picture = draw(figure, **{left_out: False})
        assert {part for part, x in places.items() if any(pixel(picture, x, 0.5))} == places.keys() - {left_out}


def test_all_people_are_drawn_and_joints_lie_over_limbs():
    lying = person(body=[(1, 0.1, 0.5, 1), (2, 0.9, 0.5, 1)])
    point = person(body=[(0, 0.5, 0.5, 1)])
    for people in ((lying, point), (point, lying)):
        assert pixel(draw(*people, colors="openpose"), 0.5, 0.5) == [255, 0, 0]


def test_an_empty_frame_is_black():
    assert not draw().any()


@pytest.mark.parametrize("colors", ["controlnext", "openpose"])
def test_the_picture_takes_the_asked_size_and_the_pose_stretches_with_it(colors):
    picture = draw_pose(Frame(100, 100, [person(face=[(0, 0.75, 0.25, 1)])]), 1728, 1080, colors=colors)
    assert picture.shape == (1080, 1728, 3)
    ys, xs = np.nonzero(picture.any(axis=2))
    assert (round(xs.mean()), round(ys.mean())) == (1296, 270)


def test_a_strip_one_pixel_wide_is_drawn_in_little_memory():
    figure = person(body=[(1, 0.5, 0.1, 1), (8, 0.5, 0.9, 1)])
    picture = draw_pose(Frame(100, 100, [figure]), 1, 16384)
    assert picture.shape == (16384, 1, 3) and picture.any()


def lit(line):
    return int(np.count_nonzero(line.any(axis=1)))


def test_stick_width_is_half_the_thickness_of_limbs_and_joints_in_pixels_of_the_openpose_look():
    figure = person(body=[(1, 0.2, 0.5, 1), (2, 0.8, 0.5, 1), (17, 0.5, 0.9, 1)], left_hand=[(0, 0.1, 0.1, 1)])
    for width in (4, 12):
        picture = draw(figure, colors="openpose", stick_width=width)
        assert lit(picture[400:700, 540]) == 2 * width + 1  # the middle of the limb
        assert lit(picture[800:, 540]) == 2 * width + 1  # a joint
        assert lit(picture[:200, 108]) == 9  # hands keep their width


def test_stick_width_grows_with_the_picture_in_the_trained_look():
    figure = person(body=[(1, 0.2, 0.5, 1), (2, 0.8, 0.5, 1)])
    assert [lit(draw(figure, stick_width=width)[:, 540]) for width in (4, 12)] == [5, 13]
    assert np.array_equal(draw(figure, stick_width=4), draw(figure))


@pytest.mark.parametrize("stick_width", [0, 101, -1, 10**9, float("nan"), None, "wide"])
def test_a_stick_width_that_cannot_be_drawn_is_an_error(stick_width):
    with pytest.raises(ValueError, match="^stick_width is '.*' where 1 to 100 pixels are expected: 4 draws as trained"):
        draw(stick_width=stick_width)


def test_other_colors_are_an_error_that_lists_the_choices():
    with pytest.raises(ValueError, match="^colors is 'red' where one of controlnext, openpose is expected.$"):
        draw(colors="red")
