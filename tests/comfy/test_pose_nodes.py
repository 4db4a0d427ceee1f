import json
import time

import cv2
import numpy as np
import pytest
import torch

pytestmark = pytest.mark.versions

BODY, FACE = "pose_keypoints_2d", "face_keypoints_2d"


@pytest.fixture
def golden_pose(goldens):
    return json.loads((goldens.folder / "pose" / "one_person_576x1024.json").read_text())


@pytest.fixture
def golden_align(goldens):
    return json.loads((goldens.folder / "pose" / "align.json").read_text())


def dwpose_frame(people=1, width=640, height=480):
    """What a DWPose node gives where it sees neither hands nor face: None, and (0, 0, 0) for joints it did not find."""
    joints = [[300 + 7 * joint, 100 + 15 * joint, 1.0] for joint in range(18)]
    joints[4] = joints[7] = [0.0, 0.0, 0.0]
    person = {
        BODY: [number for joint in joints for number in joint],
        FACE: None,
        "hand_left_keypoints_2d": None,
        "hand_right_keypoints_2d": None,
    }
    return {"people": [person] * people, "canvas_height": height, "canvas_width": width}


def body_of(frame):
    return np.reshape(frame["people"][0][BODY], (-1, 3))


def test_draw_pose_gives_the_reference_implementations_picture(run, goldens, golden_pose):
    expected = cv2.cvtColor(cv2.imread(str(goldens.folder / "pose" / "one_person_576x1024.png")), cv2.COLOR_BGR2RGB)
    image = run("ControlNeXtDrawPose", keypoints=golden_pose)
    assert image.shape == (1, 1024, 576, 3) and image.dtype == torch.float32
    seen = (image[0] > 0).any(dim=2).numpy() | expected.any(axis=2)
    assert (np.abs(image[0].numpy() * 255 - expected).max(axis=2) < 1.5)[seen].mean() >= 0.999


def test_align_pose_gives_the_reference_implementations_bodies_in_pixels_of_the_reference(run, golden_align):
    reference = golden_align["reference"]
    first, *aligned = run("ControlNeXtAlignPose", keypoints=golden_align["frames"], reference=reference)
    canvas = reference[0]["canvas_width"], reference[0]["canvas_height"]
    for frame, expected in zip(aligned, golden_align["aligned_body"], strict=True):
        assert (frame["canvas_width"], frame["canvas_height"]) == canvas
        np.testing.assert_allclose(body_of(frame)[:, :2] / canvas, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(first["people"][0][BODY], reference[0]["people"][0][BODY])


def test_align_pose_without_prepending_gives_one_frame_for_each_frame(run, golden_align):
    frames = golden_align["frames"]
    inputs = {"keypoints": frames, "reference": golden_align["reference"]}
    assert len(run("ControlNeXtAlignPose", **inputs, prepend_reference=False)) == len(frames)
    assert len(run("ControlNeXtAlignPose", **inputs, prepend_reference=True)) == len(frames) + 1


def test_align_pose_uses_the_first_frame_of_a_longer_reference(run, golden_align):
    frames, reference = golden_align["frames"], golden_align["reference"]
    longer = run("ControlNeXtAlignPose", keypoints=frames, reference=reference + frames)
    assert longer == run("ControlNeXtAlignPose", keypoints=frames, reference=reference)


def test_a_reference_without_a_person_is_an_error_in_one_sentence(run, golden_align):
    empty = [{"canvas_width": 576, "canvas_height": 1024, "people": []}]
    with pytest.raises(ValueError, match="^reference shows no body"):
        run("ControlNeXtAlignPose", keypoints=golden_align["frames"], reference=empty)


def test_poses_of_dwpose_with_none_hands_and_faces_are_aligned_and_drawn(run):
    frames = [dwpose_frame(), dwpose_frame(people=0), dwpose_frame(people=2)]
    aligned = run("ControlNeXtAlignPose", keypoints=frames, reference=[dwpose_frame(width=1280, height=960)])
    assert [len(frame["people"]) for frame in aligned] == [1, 1, 0, 2]
    np.testing.assert_allclose(body_of(aligned[1]), body_of(aligned[0]), atol=1e-9)
    image = run("ControlNeXtDrawPose", keypoints=aligned)
    assert image.shape == (4, 960, 1280, 3)
    assert image.flatten(1).any(dim=1).tolist() == [True, True, False, True]
    assert not image[:, :90, :290].any(), "joints that were not found were drawn"


@pytest.mark.parametrize("mark", [(-1, -1, 1), (-1 / 576, -1 / 1024, 1), (0, 0, 1), (90, 90, 0)])
@pytest.mark.parametrize("part, count", [("hand_left_keypoints_2d", 21), ("hand_right_keypoints_2d", 5), (FACE, 68),
                                         (FACE, 1)])
def test_what_was_not_found_is_nowhere_after_aligning(run, golden_pose, golden_align, part, count, mark):
    def picture(missing):
        golden_pose[0]["people"][0][part][: 3 * count] = list(missing) * count
        aligned = run("ControlNeXtAlignPose", keypoints=golden_pose, reference=golden_align["reference"])
        return run("ControlNeXtDrawPose", keypoints=aligned)
    assert torch.equal(picture(mark), picture((0, 0, 0)))


@pytest.mark.parametrize("width, height, shape", [(0, 0, (480, 640)), (832, 0, (480, 832)), (320, 576, (576, 320))])
def test_width_and_height_of_0_take_the_keypoints_canvas(run, width, height, shape):
    image = run("ControlNeXtDrawPose", keypoints=[dwpose_frame()], width=width, height=height)
    assert image.shape == (1, *shape, 3)


def test_given_width_and_height_serve_keypoints_without_a_canvas(run):
    frame = dwpose_frame()
    drawn = run("ControlNeXtDrawPose", keypoints=[frame])
    bare = [{"people": frame["people"]}]
    assert torch.equal(run("ControlNeXtDrawPose", keypoints=bare, width=640, height=480), drawn)


@pytest.mark.parametrize("side", [-1, 16385, 10**9, float("nan"), None, "wide"])
@pytest.mark.parametrize("name", ["width", "height"])
def test_a_width_or_height_that_no_picture_has_is_an_error(run, name, side):
    with pytest.raises(ValueError, match=f"^{name} is '.*' where 0 to 16384 pixels are expected: 0 takes"):
        run("ControlNeXtDrawPose", keypoints=[dwpose_frame()], **{name: side})


def test_pictures_that_memory_cannot_hold_are_an_error_in_one_sentence(run):
    with pytest.raises(ValueError, match="^keypoints: 2000 pictures of 16384x16384 pixels are more than memory holds"):
        run("ControlNeXtDrawPose", keypoints=[dwpose_frame()] * 2000, width=16384, height=16384)


def test_a_face_of_56_points_is_drawn_as_the_points_it_has(run, golden_pose):
    person = golden_pose[0]["people"][0]
    whole = run("ControlNeXtDrawPose", keypoints=golden_pose, draw_body=False, draw_hands=False)
    del person[FACE][:36]
    drawn = run("ControlNeXtDrawPose", keypoints=golden_pose, draw_body=False, draw_hands=False)
    assert 0.5 < drawn.any(dim=3).sum() / whole.any(dim=3).sum() < 1


@pytest.fixture
def sdpose(run, comfy_nodes):
    """sdpose(keypoints, ...): what ComfyUI's own node draws of them by default, (frames, height, width, 3)."""
    inputs = comfy_nodes["SDPoseDrawKeypoints"].INPUT_TYPES()["required"]
    defaults = {name: spec[1]["default"] for name, spec in inputs.items() if name != "keypoints"}
    return lambda keypoints, **others: run("SDPoseDrawKeypoints", keypoints=keypoints, **(defaults | others))


def test_comfyuis_own_node_draws_aligned_poses(run, sdpose, golden_align):
    aligned = run("ControlNeXtAlignPose", keypoints=golden_align["frames"], reference=golden_align["reference"])
    assert sdpose(aligned).flatten(1).any(dim=1).all()
    aligned = run("ControlNeXtAlignPose", keypoints=[dwpose_frame()], reference=[dwpose_frame()])
    assert sdpose(aligned).flatten(1).any(dim=1).all()


def test_the_openpose_look_covers_the_same_pixels_as_comfyuis_own_node(run, sdpose, golden_pose):
    aligned = run("ControlNeXtAlignPose", keypoints=golden_pose, reference=golden_pose)
    ours = run("ControlNeXtDrawPose", keypoints=aligned, colors="openpose").any(dim=3)
    theirs = sdpose(aligned).any(dim=3)
    assert (ours & theirs).sum() / (ours | theirs).sum() > 0.99


def test_limbs_are_as_thick_as_those_of_comfyuis_own_node(run, sdpose):
    frame = dwpose_frame()
    ours = run("ControlNeXtDrawPose", keypoints=[frame], colors="openpose", stick_width=8).any(dim=3)
    aligned = run("ControlNeXtAlignPose", keypoints=[frame], reference=[frame], prepend_reference=False)
    theirs = sdpose(aligned, stick_width=8).any(dim=3)
    assert (theirs & ~ours).sum() < 0.01 * theirs.sum()


def test_fifty_frames_of_576x1024_are_drawn_within_ten_seconds(run, golden_pose):
    start = time.perf_counter()
    assert len(run("ControlNeXtDrawPose", keypoints=golden_pose * 50)) == 50
    assert time.perf_counter() - start < 10


def test_drawing_reports_each_frame_to_the_progress_bar(run, golden_pose, monkeypatch):
    import comfy.utils
    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: seen.append((value, total)))
    run("ControlNeXtDrawPose", keypoints=golden_pose * 3)
    assert seen[-1] == (3, 3)


def test_an_interrupt_stops_the_drawing(run, golden_pose):
    from comfy.model_management import InterruptProcessingException, interrupt_current_processing
    interrupt_current_processing()
    with pytest.raises(InterruptProcessingException):
        run("ControlNeXtDrawPose", keypoints=golden_pose)


def test_the_nodes_keep_their_contract(comfy_nodes):
    align, draw = (comfy_nodes[node_id] for node_id in ("ControlNeXtAlignPose", "ControlNeXtDrawPose"))
    assert align.INPUT_TYPES()["required"].keys() == {"keypoints", "reference", "prepend_reference"}
    parts = ("draw_body", "draw_hands", "draw_face")
    inputs = draw.INPUT_TYPES()["required"]
    assert list(inputs) == ["keypoints", "width", "height", *parts, "colors"]
    assert all(inputs[part][0] == "BOOLEAN" and inputs[part][1]["default"] is True for part in parts)
    assert inputs["colors"][1]["options"] == ["controlnext", "openpose"]
    (optional,) = draw.INPUT_TYPES()["optional"].items()
    assert (optional[0], optional[1][0], optional[1][1]["default"]) == ("stick_width", "INT", 4)
    assert (align.RETURN_TYPES, draw.RETURN_TYPES) == (["POSE_KEYPOINT"], ["IMAGE"])
    assert (align.RETURN_NAMES, draw.RETURN_NAMES) == (["keypoints"], ["image"])
    assert {align.CATEGORY, draw.CATEGORY} == {"ControlNeXt"}
