"""POSE_KEYPOINT, the pose format that ComfyUI's pose nodes share, read into arrays and written back."""

from typing import NamedTuple

import numpy as np

BODY = "pose_keypoints_2d"
FEET = "foot_keypoints_2d"
FACE = "face_keypoints_2d"
LEFT_HAND = "hand_left_keypoints_2d"
RIGHT_HAND = "hand_right_keypoints_2d"
POINT_COUNTS = {BODY: 18, FEET: 6, FACE: 70, LEFT_HAND: 21, RIGHT_HAND: 21}

# A face's 70 points are 68 landmarks and the eyes of the body; some files hold the landmarks alone.
FACE_LANDMARKS = 68
EYES = [14, 15]

# Fractions of the canvas may lie a little outside it; a person within two pixels is no person.
LARGEST_FRACTION = 2.0


class Frame(NamedTuple):
    """The people of one picture.

    ``people`` holds, for each person, every key of POINT_COUNTS with a float64 array (points, 3) of x, y and score; x
    and y are fractions of the canvas (0 to 1 inside it), and a point that was not found is all zeros.
    """

    width: int
    height: int
    people: list[dict[str, np.ndarray]]


def read_pose_keypoints(keypoints: list | dict | None, name: str, canvas: tuple[int, int] | None = None) -> list[Frame]:
    """Read what SDPose and DWPose nodes give, and hand-written JSON.

    Frames, people and their parts may be None or missing. Coordinates are pixels or fractions of the canvas, one of
    the two for the whole sequence. A point whose x, y and score are all 0 or less was not found; a person without any
    point is not there.

    Args:
        keypoints: a list of frames, or a single one.
        name: the input's name, for errors.
        canvas: (width, height) where no frame states a canvas; else frames without one take the first stated.

    Returns:
        One Frame per picture.

    Raises:
        ValueError: no frames, a wrong number of points, or no canvas known.
    """
    entries = [keypoints] if isinstance(keypoints, dict) else [entry or {} for entry in keypoints or []]
    if not entries:
        raise ValueError(f"{name} holds no frames: connect the keypoints of a pose estimation node.")

    people = [
        [_read_person(person, f"{name}, frame {i}, person {j}") for j, person in enumerate(entry.get("people") or [])]
        for i, entry in enumerate(entries)
    ]
    people = [[person for person in frame if any(points.any() for points in person.values())] for frame in people]

    sizes = [(entry.get("canvas_width"), entry.get("canvas_height")) for entry in entries]
    canvas = next((size for size in sizes if all(size)), canvas)
    if canvas is None:
        raise ValueError(f"{name} states no canvas size: add canvas_width and canvas_height to its frames.")
    sizes = [tuple(int(side) for side in (size if all(size) else canvas)) for size in sizes]

    parts = [points for frame in people for person in frame for points in person.values()]
    in_pixels = max((np.abs(points[:, :2]).max() for points in parts), default=0) > LARGEST_FRACTION
    for size, frame in zip(sizes, people, strict=True):
        for person in frame:
            for points in person.values():
                points[:, :2] /= size if in_pixels else (1, 1)
    return [Frame(*size, frame) for size, frame in zip(sizes, people, strict=True)]


def write_pose_keypoints(frames: list[Frame]) -> list[dict]:
    """The frames as POSE_KEYPOINT, in pixels, with all parts of each person, as ComfyUI's own drawing node needs."""
    return [
        {
            "canvas_width": frame.width,
            "canvas_height": frame.height,
            "people": [
                {part: (points * (frame.width, frame.height, 1)).ravel().tolist() for part, points in person.items()}
                for person in frame.people
            ],
        }
        for frame in frames
    ]


def _read_person(person: dict | None, name: str) -> dict[str, np.ndarray]:
    parts = {part: _read_points(person or {}, part, name) for part in POINT_COUNTS}
    if len(parts[FACE]) == FACE_LANDMARKS:
        parts[FACE] = np.concatenate([parts[FACE], parts[BODY][EYES]])
    return parts


def _read_points(person: dict, part: str, name: str) -> np.ndarray:
    count = POINT_COUNTS[part]
    numbers = np.array([] if person.get(part) is None else person[part], dtype=np.float64).ravel()
    if not numbers.size:
        return np.zeros((count, 3))
    if numbers.size != 3 * count and not (part == FACE and numbers.size == 3 * FACE_LANDMARKS):
        raise ValueError(
            f"{name}: {part} holds {numbers.size} numbers instead of {3 * count} (x, y and score of {count} points): "
            "use a pose node that gives OpenPose's 18 body joints."
        )
    points = numbers.reshape(-1, 3)
    points[(points <= 0).all(axis=1)] = 0
    return points
