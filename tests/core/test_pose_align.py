import json

import numpy as np
import pytest

from controlnext_core.pose_align import align_pose, fit_pose
from controlnext_core.pose_keypoints import BODY, FACE, LEFT_HAND, POINT_COUNTS, Frame, read_pose_keypoints

WIDE, TALL = (640, 360), (576, 1024)


def random_person(rng, score=0.9):
    return {
        part: np.column_stack([rng.uniform(0.2, 0.8, (count, 2)), np.full(count, score)])
        for part, count in POINT_COUNTS.items()
    }


def moved(person, scale, shift):
    return {part: points * (*scale, 1) + (*shift, 0) for part, points in person.items()}


def matching_scale(scale_y):
    """The scale of x that keeps a body's proportions from a WIDE canvas to a TALL one."""
    return scale_y * (WIDE[0] / WIDE[1]) * (TALL[1] / TALL[0]), scale_y


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def golden(goldens):
    return json.loads((goldens.folder / "pose" / "align.json").read_text())


def test_the_fit_equals_the_reference_implementation(golden):
    frames = read_pose_keypoints(golden["frames"], "keypoints")
    scale, shift = fit_pose(frames, read_pose_keypoints(golden["reference"], "reference")[0])
    np.testing.assert_allclose([*scale, *shift], [golden[k] for k in ("ax", "ay", "bx", "by")], rtol=0, atol=1e-6)


def test_aligned_bodies_equal_the_reference_implementation(golden):
    frames = read_pose_keypoints(golden["frames"], "keypoints")
    aligned = align_pose(frames, read_pose_keypoints(golden["reference"], "reference")[0], prepend_reference=False)
    bodies = [frame.people[0][BODY][:, :2] for frame in aligned]
    np.testing.assert_allclose(bodies, golden["aligned_body"], rtol=0, atol=1e-6)


def test_a_known_change_of_size_and_place_is_recovered_in_every_part(rng):
    person = random_person(rng)
    scale, shift = matching_scale(1.3), (-0.4, 0.07)
    reference = Frame(*TALL, [moved(person, scale, shift)])
    (aligned,) = align_pose([Frame(*WIDE, [person])], reference, prepend_reference=False)
    assert (aligned.width, aligned.height) == TALL
    for part in POINT_COUNTS:
        np.testing.assert_allclose(aligned.people[0][part], reference.people[0][part], atol=1e-12)


def test_elbows_wrists_and_joints_that_the_reference_scores_low_do_not_count(rng):
    person = random_person(rng)
    reference = Frame(*TALL, [moved(person, matching_scale(0.8), (0.1, 0.1))])
    expected = fit_pose([Frame(*WIDE, [person])], reference)
    reference.people[0][BODY][[3, 4, 6, 7], :2] += 0.3
    reference.people[0][BODY][10] = 0.9, 0.9, 0.3
    np.testing.assert_allclose(fit_pose([Frame(*WIDE, [person])], reference), expected, atol=1e-12)


def test_joints_of_the_video_count_whatever_their_score(rng):
    person, reference = random_person(rng), Frame(*TALL, [random_person(rng)])
    doubtful = {part: points * (1, 1, 0.01) for part, points in person.items()}
    np.testing.assert_array_equal(
        fit_pose([Frame(*WIDE, [doubtful])], reference), fit_pose([Frame(*WIDE, [person])], reference)
    )


def test_joints_that_were_not_found_neither_count_nor_move(rng):
    person = random_person(rng)
    reference = Frame(*TALL, [moved(person, matching_scale(1.2), (0.2, -0.1))])
    person[BODY][[10, 13]] = 0
    person[LEFT_HAND][:] = 0
    _, aligned = align_pose([Frame(*WIDE, [person])], reference)
    assert not aligned.people[0][BODY][[10, 13]].any()
    assert not aligned.people[0][LEFT_HAND].any()
    np.testing.assert_allclose(aligned.people[0][FACE], reference.people[0][FACE], atol=1e-12)


def test_frames_without_people_stay_empty_and_in_place(rng):
    person = random_person(rng)
    frames = [Frame(*WIDE, people) for people in ([], [person], [])]
    aligned = align_pose(frames, Frame(*TALL, [random_person(rng)]), prepend_reference=False)
    assert [len(frame.people) for frame in aligned] == [0, 1, 0]


def test_frames_with_several_people_are_moved_but_do_not_shape_the_fit(rng):
    first, second, reference = random_person(rng), random_person(rng), Frame(*TALL, [random_person(rng)])
    scale, shift = fit_pose([Frame(*WIDE, [first])], reference)
    aligned = align_pose([Frame(*WIDE, [first]), Frame(*WIDE, [second, first])], reference, prepend_reference=False)
    for person, source in zip(aligned[1].people, (second, first), strict=True):
        np.testing.assert_allclose(person[FACE], moved(source, scale, shift)[FACE], atol=1e-12)


def test_the_reference_is_prepended_unchanged_with_all_its_people(rng):
    frames = [Frame(*WIDE, [random_person(rng)])]
    reference = Frame(*TALL, [random_person(rng), random_person(rng)])
    assert align_pose(frames, reference)[0] is reference
    assert len(align_pose(frames, reference)) == 2
    assert len(align_pose(frames, reference, prepend_reference=False)) == 1


@pytest.mark.parametrize("score", [None, 0.3])
def test_a_reference_without_a_body_is_an_error(rng, score):
    people = [] if score is None else [random_person(rng, score)]
    with pytest.raises(ValueError, match="reference shows no body"):
        fit_pose([Frame(*WIDE, [random_person(rng)])], Frame(*TALL, people))


def test_a_video_without_a_frame_of_exactly_one_person_is_an_error(rng):
    frames = [Frame(*WIDE, []), Frame(*WIDE, [random_person(rng), random_person(rng)])]
    with pytest.raises(ValueError, match="keypoints has no frame with exactly one person"):
        fit_pose(frames, Frame(*TALL, [random_person(rng)]))


def test_joints_at_one_height_are_an_error_and_no_warning(rng):
    person, reference = random_person(rng), random_person(rng)
    person[BODY][:, 1] = 0.5 + np.arange(18) * 1e-12
    with pytest.raises(ValueError, match="share too few body joints"):
        fit_pose([Frame(*WIDE, [person])], Frame(*TALL, [reference]))


def test_bodies_that_share_less_than_two_joints_are_an_error(rng):
    person, reference = random_person(rng), random_person(rng)
    person[BODY][2:] = 0
    reference[BODY][:2] = 0
    with pytest.raises(ValueError, match="share too few body joints"):
        fit_pose([Frame(*WIDE, [person])], Frame(*TALL, [reference]))
