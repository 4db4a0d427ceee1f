"""Fitting the poses of a video to the pose of a reference picture, as ControlNeXt's video models were given them."""

import numpy as np

from .pose_keypoints import BODY, Frame

# OpenPose's body joints without elbows and wrists, which move too freely to measure a body by.
FIT_JOINTS = np.array([0, 1, 2, 5, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17])
REFERENCE_SCORE = 0.3
SAME_HEIGHT = 1e-6  # as a fraction of the canvas


def fit_pose(frames: list[Frame], reference: Frame) -> tuple[np.ndarray, np.ndarray]:
    """The scale and shift that lay the person of ``frames`` over the first person of ``reference``.

    As the reference implementation: it compares the joints FIT_JOINTS that score above 0.3 in the reference picture, in
    all frames with exactly one person, whatever their score there. Heights are fitted by least squares; widths take
    the same scale, corrected for the shapes of the two canvases, and the mean shift. Joints that a frame lacks
    altogether are left out, which the reference's detector never meets.

    Args:
        frames: coordinates in fractions of the canvas; the first frame's shape stands for the whole video.
        reference: likewise.

    Returns:
        Scale and shift of (x, y), float64 arrays (2,): aligned = point * scale + shift.

    Raises:
        ValueError: no body in the reference, no frame with exactly one person, or no two heights to compare.
    """
    body = reference.people[0][BODY] if reference.people else np.zeros((18, 3))
    joints = FIT_JOINTS[body[FIT_JOINTS, 2] > REFERENCE_SCORE]
    if not joints.size:
        raise ValueError(
            "reference shows no body in its first frame (no joint of head, trunk or legs with a score above 0.3): "
            "use a picture that shows the person clearly."
        )
    singles = [frame.people[0][BODY][joints] for frame in frames if len(frame.people) == 1]
    if not singles:
        raise ValueError(
            "keypoints has no frame with exactly one person, by which the alignment is measured: "
            "use a video that shows one person alone in at least one frame."
        )
    moving, fixed = np.concatenate(singles), np.tile(body[joints], (len(singles), 1))
    found = moving.any(axis=1)
    (x, y, _), (x_reference, y_reference, _) = moving[found].T, fixed[found].T
    if not found.any() or min(np.ptp(y), np.ptp(y_reference)) < SAME_HEIGHT:
        raise ValueError(
            "keypoints and reference share too few body joints to compare heights: "
            "use a reference picture that shows the part of the body that the video shows."
        )

    scale_y, shift_y = np.polyfit(y, y_reference, 1)
    scale_x = scale_y * (frames[0].width / frames[0].height) * (reference.height / reference.width)
    shift_x = np.mean(x_reference - scale_x * x)
    return np.array([scale_x, scale_y]), np.array([shift_x, shift_y])


def align_pose(frames: list[Frame], reference: Frame, prepend_reference: bool = True) -> list[Frame]:
    """Everybody in ``frames`` moved by the one transform of ``fit_pose``, on the reference's canvas.

    Scores stay as they are; frames without people stay empty and points that were not found stay so. With
    ``prepend_reference`` the reference pose, unchanged, is the first frame. Raises as ``fit_pose`` does.
    """
    scale, shift = fit_pose(frames, reference)

    def moved(person: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {part: _transform(points, scale, shift) for part, points in person.items()}

    aligned = [Frame(reference.width, reference.height, list(map(moved, frame.people))) for frame in frames]
    return [reference, *aligned] if prepend_reference else aligned


def _transform(points: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    moved = points.copy()
    moved[:, :2] = np.where(points.any(axis=1, keepdims=True), points[:, :2] * scale + shift, 0)
    return moved
