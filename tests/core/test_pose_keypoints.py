import copy
import json

import numpy as np
import pytest

from controlnext_core.pose_keypoints import (
    BODY,
    FACE,
    LEFT_HAND,
    POINT_COUNTS,
    read_pose_keypoints,
    write_pose_keypoints,
)


@pytest.fixture
def pixel_frames(goldens):
    return json.loads((goldens.folder / "pose" / "one_person_576x1024.json").read_text())


def as_fractions(frames):
    frames = copy.deepcopy(frames)
    for frame in frames:
        for person in frame["people"]:
            for part, numbers in person.items():
                points = np.reshape(numbers, (-1, 3)) / (frame["canvas_width"], frame["canvas_height"], 1)
                person[part] = points.ravel().tolist()
    return frames


def body(*points):
    """A body of the given (joint, x, y, score); the other joints as DWPose nodes write missing ones."""
    numbers = np.zeros((18, 3))
    for joint, x, y, score in points:
        numbers[joint] = x, y, score
    return numbers.ravel().tolist()


def test_writing_gives_back_what_was_read_in_pixels(pixel_frames):
    person = write_pose_keypoints(read_pose_keypoints(pixel_frames, "keypoints"))[0]["people"][0]
    for part, numbers in pixel_frames[0]["people"][0].items():
        np.testing.assert_allclose(person[part][: len(numbers)], numbers, rtol=1e-12)


def test_every_part_is_written_in_full_with_the_eyes_added_to_68_face_landmarks(pixel_frames):
    person = write_pose_keypoints(read_pose_keypoints(pixel_frames, "keypoints"))[0]["people"][0]
    assert {part: len(numbers) for part, numbers in person.items()} == {p: 3 * n for p, n in POINT_COUNTS.items()}
    assert person[FACE][-6:] == pytest.approx(person[BODY][3 * 14 : 3 * 16])


def test_fractions_of_the_canvas_read_as_the_same_poses_as_pixels(pixel_frames):
    pixels, fractions = (read_pose_keypoints(f, "keypoints")[0] for f in (pixel_frames, as_fractions(pixel_frames)))
    for part in POINT_COUNTS:
        np.testing.assert_allclose(fractions.people[0][part], pixels.people[0][part], atol=1e-12)


def test_fractions_a_little_outside_the_canvas_are_still_fractions():
    frame = {"canvas_width": 512, "canvas_height": 512, "people": [{BODY: body((0, 1.1, 0.5, 1), (1, -0.2, 1.3, 1))}]}
    assert read_pose_keypoints([frame], "keypoints")[0].people[0][BODY][:2, 0].tolist() == [1.1, -0.2]


def test_pixels_are_recognised_by_the_whole_sequence_not_frame_by_frame():
    corner, middle = ({BODY: body((0, x, x, 1))} for x in (2, 200))
    frames = [{"canvas_width": 400, "canvas_height": 400, "people": [person]} for person in (corner, middle)]
    assert read_pose_keypoints(frames, "keypoints")[0].people[0][BODY][0, 0] == 2 / 400


def test_none_hands_faces_people_and_frames_read_as_nobody_there():
    canvas = {"canvas_width": 640, "canvas_height": 480}
    person = {BODY: body((0, 320, 240, 1)), FACE: None, LEFT_HAND: []}
    frames = read_pose_keypoints([{**canvas, "people": [person, None]}, None, {**canvas, "people": None}, canvas], "k")
    assert [len(frame.people) for frame in frames] == [1, 0, 0, 0]
    assert not frames[0].people[0][FACE].any() and not frames[0].people[0][LEFT_HAND].any()
    assert (frames[1].width, frames[1].height) == (640, 480)


def test_hand_written_integers_and_a_single_frame_without_a_list_are_read():
    frame = {"canvas_width": 100, "canvas_height": 200, "people": [{BODY: [50, 50, 1] + [0, 0, 0] * 17}]}
    assert read_pose_keypoints(frame, "keypoints")[0].people[0][BODY][0].tolist() == [0.5, 0.25, 1.0]


@pytest.mark.parametrize("x", [0, -1])
def test_a_point_of_score_0_at_the_origin_or_before_was_not_found(x):
    frame = {"canvas_width": 9, "canvas_height": 9, "people": [{BODY: body((0, 5, 5, 1), (1, x, x, 0), (2, 4, 4, 0))}]}
    points = read_pose_keypoints([frame], "keypoints")[0].people[0][BODY]
    assert not points[1].any()
    assert points[2].any()


def test_a_person_without_any_point_is_not_there():
    frame = {"canvas_width": 9, "canvas_height": 9, "people": [{BODY: body()}, {BODY: body((0, 5, 5, 1))}]}
    assert len(read_pose_keypoints([frame], "keypoints")[0].people) == 1


def test_the_given_canvas_serves_where_no_frame_states_one():
    frames = [{"people": [{BODY: body((0, 50, 50, 1))}]}]
    assert read_pose_keypoints(frames, "keypoints", canvas=(100, 200))[0].people[0][BODY][0].tolist() == [0.5, 0.25, 1]
    with pytest.raises(ValueError, match="keypoints states no canvas size: add canvas_width and canvas_height"):
        read_pose_keypoints(frames, "keypoints")


@pytest.mark.parametrize("nothing", [None, []])
def test_no_frames_is_an_error_that_names_the_input(nothing):
    with pytest.raises(ValueError, match="reference holds no frames"):
        read_pose_keypoints(nothing, "reference")


def test_the_25_joints_of_another_body_model_are_an_error_that_says_where():
    frames = [{"canvas_width": 9, "canvas_height": 9, "people": [{BODY: [1.0] * 75}]}]
    with pytest.raises(ValueError, match=r"keypoints, frame 0, person 0: pose_keypoints_2d holds 75 numbers"):
        read_pose_keypoints(frames, "keypoints")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), None, 1e9, -1e300])
@pytest.mark.parametrize("unit", [1, 512])
def test_a_point_that_is_no_number_or_far_off_was_not_found_and_changes_no_other(number, unit):
    joints = [(joint, unit * (0.2 + joint / 40), unit * 0.5, 1) for joint in range(18)]
    frames = [{"canvas_width": 512, "canvas_height": 512, "people": [{BODY: body(*joints)}]}]
    expected = read_pose_keypoints(frames, "keypoints")[0].people[0][BODY]
    for place in range(9, 12):
        frames[0]["people"][0][BODY] = [*body(*joints)[:place], number, *body(*joints)[place + 1 :]]
        points = read_pose_keypoints(frames, "keypoints")[0].people[0][BODY]
        assert not points[3].any()
        np.testing.assert_array_equal(np.delete(points, 3, axis=0), np.delete(expected, 3, axis=0))


@pytest.mark.parametrize("side", [-480, 16385, 10**9, float("nan"), float("inf"), "wide", []])
def test_a_canvas_that_no_picture_has_is_an_error_that_says_where(side):
    frames = [{"canvas_width": 9, "canvas_height": 9}, {"canvas_width": 9, "canvas_height": side}]
    with pytest.raises(ValueError, match="^keypoints, frame 1: canvas_height is '.*' where 1 to 16384 pixels"):
        read_pose_keypoints(frames, "keypoints")


@pytest.mark.parametrize("side", [0, None])
def test_a_canvas_of_0_is_not_stated(side):
    frames = [{"canvas_width": side, "canvas_height": 9}, {"canvas_width": 8, "canvas_height": 9}]
    assert [frame[:2] for frame in read_pose_keypoints(frames, "keypoints")] == [(8, 9), (8, 9)]


WRONG = {
    "keypoints is a str where a list is expected": "[]",
    "keypoints, frame 0 is a int where a dict is expected": [3],
    "keypoints, frame 0: people is a dict where a list is expected": {"people": {}},
    "keypoints, frame 0, person 0 is a list where a dict is expected": {"people": [[1, 2, 3]]},
    "keypoints, frame 0, person 0: pose_keypoints_2d holds something other than numbers": {"people": [{BODY: ["x"]}]},
}


@pytest.mark.parametrize("words", WRONG)
def test_what_is_no_pose_keypoint_is_an_error_that_says_where_and_what(words):
    frames = WRONG[words]
    if isinstance(frames, dict):
        frames |= {"canvas_width": 9, "canvas_height": 9}
    with pytest.raises(ValueError, match=f"^{words}.*: connect the keypoints of a pose estimation node.$"):
        read_pose_keypoints(frames, "keypoints")
