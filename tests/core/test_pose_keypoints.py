import copy
import json
import re

import numpy as np
import pytest

from controlnext_core.pose_keypoints import (
    BODY,
    FACE,
    FACE_LANDMARKS,
    LEFT_HAND,
    POINT_COUNTS,
    RIGHT_HAND,
    read_pose_keypoints,
    write_pose_keypoints,
)


@pytest.fixture
def pixel_frames(goldens):
    return json.loads((goldens.folder / "pose" / "one_person_576x1024.json").read_text())


def as_fractions(frames, *parts):
    """The frames with these parts of everybody, or all, in fractions of the canvas."""
    frames = copy.deepcopy(frames)
    for frame in frames:
        for person in frame["people"]:
            for part in parts or person:
                points = np.reshape(person[part], (-1, 3)) / (frame["canvas_width"], frame["canvas_height"], 1)
                person[part] = points.ravel().tolist()
    return frames


def read_person(size=(100, 200), **parts):
    """The one person of a frame with these body, face, left_hand, right_hand."""
    names = {"body": BODY, "face": FACE, "left_hand": LEFT_HAND, "right_hand": RIGHT_HAND}
    frame = dict(zip(("canvas_width", "canvas_height"), size, strict=True))
    frame["people"] = [{names[part]: numbers for part, numbers in parts.items()}]
    return read_pose_keypoints([frame], "keypoints")[0].people[0]


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


MARKS = [(0, 0, 0), (-1, -1, 0), (40, 50, 0), (40, 50, -0.2), (0, 0, 1), (-1, -1, 0.8), (-1, 50, 1), (40, -1, 1)]


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("part", [BODY, FACE, LEFT_HAND])
def test_a_point_without_a_score_or_a_place_was_not_found(pixel_frames, part, mark):
    expected = read_pose_keypoints(pixel_frames, "keypoints")[0].people[0][part]
    for index in (0, 7):
        pixel_frames[0]["people"][0][part][3 * index : 3 * index + 3] = mark
        expected[index] = 0
    points = read_pose_keypoints(pixel_frames, "keypoints")[0].people[0][part]
    np.testing.assert_array_equal(points[:FACE_LANDMARKS], expected[:FACE_LANDMARKS])


@pytest.mark.parametrize("detected_on", [(570, 1000), (576, 1024)], ids=["canvas", "padded to 64s of pixels"])
@pytest.mark.parametrize("one_of_two", [False, True])
def test_openposes_marks_of_what_it_did_not_find_are_no_places(pixel_frames, detected_on, one_of_two):
    pixel_frames[0] |= {"canvas_width": 570, "canvas_height": 1000}
    mark = [-1 / np.float32(detected_on[0]), 0.5 if one_of_two else -1 / np.float32(detected_on[1]), 1.0]
    frames = as_fractions(pixel_frames)
    person = frames[0]["people"][0]
    person[LEFT_HAND] = mark * 21
    person[RIGHT_HAND][:15], person[FACE][:3] = mark * 5, mark
    expected = read_pose_keypoints(pixel_frames, "keypoints")[0].people[0]
    read = read_pose_keypoints(frames, "keypoints")[0].people[0]
    assert not read[LEFT_HAND].any() and not read[RIGHT_HAND][:5].any() and not read[FACE][0].any()
    np.testing.assert_allclose(read[RIGHT_HAND][5:], expected[RIGHT_HAND][5:])
    np.testing.assert_allclose(read[FACE][1:], expected[FACE][1:])


def test_points_given_one_by_one_may_be_none_or_empty():
    points = [None, [], *[[10 + x, 20, 1] for x in range(18)], [50, None, 1]]
    hand = read_person(left_hand=points)[LEFT_HAND]
    assert not hand[[0, 1, 20]].any() and hand[2:20].all()
    assert not read_person(body=body((0, 5, 5, 1)), left_hand=[None] * 21)[LEFT_HAND].any()


def test_a_neck_between_shoulders_keeps_its_place_without_a_score_and_no_other_neck():
    shoulders = (2, 30, 50, 0.2), (5, 70, 60, 0.2)
    assert read_person(body=body((1, 50, 55, 0), *shoulders))[BODY][1].tolist() == [0.5, 0.275, 0]
    assert not read_person(body=body((1, 50, 56, 0), *shoulders))[BODY][1].any()
    assert not read_person(body=body((1, 14.5, 24.5, 0), (2, -1, -1, 0), (5, 30, 50, 0.2)))[BODY][1].any()


@pytest.mark.parametrize("parts", [(BODY,), (LEFT_HAND, FACE), (RIGHT_HAND,)])
def test_each_part_of_a_person_is_in_pixels_or_fractions_for_itself(pixel_frames, parts):
    expected = read_pose_keypoints(pixel_frames, "keypoints")[0].people[0]
    read = read_pose_keypoints(as_fractions(pixel_frames, *parts), "keypoints")[0].people[0]
    for part in POINT_COUNTS:
        np.testing.assert_allclose(read[part], expected[part], atol=1e-12)


def test_people_and_frames_of_one_sequence_may_differ_in_their_unit(pixel_frames):
    people = [frame["people"][0] for frame in (*pixel_frames, *as_fractions(pixel_frames))]
    frames = [{**pixel_frames[0], "people": people}, *pixel_frames, *as_fractions(pixel_frames)]
    first, *others = [person for frame in read_pose_keypoints(frames, "keypoints") for person in frame.people]
    for other in others:
        np.testing.assert_allclose(other[BODY], first[BODY], atol=1e-12)


def test_a_joint_far_outside_the_canvas_makes_fractions_no_pixels():
    joints = [(joint, 0.2 + joint / 40, 0.5, 1) for joint in range(17)]
    assert read_person(body=body(*joints, (17, 0.5, 3, 1)))[BODY][17].tolist() == [0.5, 3, 1]


def test_a_part_too_small_to_tell_its_unit_is_in_that_of_the_same_part_or_in_what_it_can_only_be(pixel_frames):
    fractions = as_fractions(pixel_frames, LEFT_HAND)
    lone = {**pixel_frames[0], "people": [{LEFT_HAND: [0.4, 0.5, 1] + [0, 0, 0] * 20, BODY: body((0, 200, 200, 1))}]}
    for frames in ([lone], [*fractions, lone]):
        assert read_pose_keypoints(frames, "keypoints")[-1].people[0][LEFT_HAND][0].tolist() == [0.4, 0.5, 1]
    assert read_person(body=body((0, 50, 50, 1)), face=[1, 1, 1] + [0, 0, 0] * 67)[FACE][0].tolist() == [0.01, 0.005, 1]


@pytest.mark.parametrize("count", [1, 56, 67, 69, 71])
def test_a_face_that_lacks_points_keeps_the_others_in_their_order(count):
    points = np.column_stack([np.arange(count) + 5, np.full(count, 20), np.ones(count)])
    face = read_person(face=points.ravel().tolist())[FACE]
    assert face.shape == (70, 3)
    np.testing.assert_allclose(face[:count, 0] * 100, points[:70, 0])
    assert not face[count:].any()


@pytest.mark.parametrize("numbers", [3 * 106, 2 * 68, 3 * 478])
def test_a_face_that_is_none_of_openposes_is_left_out_with_one_line_in_the_log(caplog, numbers):
    canvas = {"canvas_width": 100, "canvas_height": 100}
    frames = [{**canvas, "people": [{BODY: body((0, 5, 5, 1)), FACE: [20.0] * numbers}]}] * 3
    read = read_pose_keypoints(frames, "keypoints")
    assert not any(frame.people[0][FACE].any() for frame in read) and read[0].people[0][BODY].any()
    (line,) = caplog.messages
    assert re.match("ControlNeXt: keypoints: 3 of 3 faces are left out", line)


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


OTHER_KINDS = {
    "frame 0 holds ['animals'] and no people": {"version": "ap10k", "animals": [[[5, 5, 1]] * 17]},
    "frame 0 holds ['animals', 'people'] and no people": {"animals": [[[5, 5, 1]] * 17], "people": []},
    "frame 0 holds ['bodies', 'hands', 'faces'] and no people": {"bodies": {}, "hands": [], "faces": []},
    "frame 0 holds ['pose_keypoints_2d'] and no people": {BODY: [1.0] * 54},
    "frame 0, person 0 holds ['keypoints'] and no pose_keypoints_2d, face or hands": {"people": [{"keypoints": [1]}]},
}


@pytest.mark.parametrize("words", OTHER_KINDS)
def test_poses_of_another_kind_are_an_error_that_says_what_is_there(words):
    frame = {**OTHER_KINDS[words], "canvas_width": 9, "canvas_height": 9}
    with pytest.raises(ValueError, match=f"^keypoints, {re.escape(words)}: connect the keypoints of a node that finds"):
        read_pose_keypoints([frame], "keypoints")


def test_a_frame_that_names_neither_people_nor_other_data_and_one_with_both_are_read():
    canvas = {"canvas_width": 9, "canvas_height": 9}
    both = {**canvas, "version": "ap10k", "people": [{LEFT_HAND: [5, 5, 1] * 21}], "animals": [[[5, 5, 1]] * 17]}
    frames = read_pose_keypoints([{**canvas, "version": 1.3}, both], "keypoints")
    assert [len(frame.people) for frame in frames] == [0, 1]
