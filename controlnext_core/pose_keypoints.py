"""POSE_KEYPOINT, the pose format that ComfyUI's pose nodes share, read into arrays and written back."""

from typing import NamedTuple

import numpy as np

BODY = "pose_keypoints_2d"
FEET = "foot_keypoints_2d"
FACE = "face_keypoints_2d"
LEFT_HAND = "hand_left_keypoints_2d"
RIGHT_HAND = "hand_right_keypoints_2d"
CANVAS = ("canvas_width", "canvas_height")
POINT_COUNTS = {BODY: 18, FEET: 6, FACE: 70, LEFT_HAND: 21, RIGHT_HAND: 21}

# A face's 70 points are 68 landmarks and the eyes of the body; some files hold the landmarks alone.
FACE_LANDMARKS = 68
EYES = [14, 15]

# Fractions of the canvas may lie a little outside it; a person within two pixels is no person.
LARGEST_FRACTION = 2.0
# What lies this many canvases off, or scores so high, is no detection.
LARGEST_POINT = np.array([10.0, 10.0, 100.0])
LARGEST_CANVAS = 16384  # as of ComfyUI's pictures


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
    the two for the whole sequence. A point was not found if its x, y and score are all 0 or less, one of them is not a
    finite number, or one is beyond LARGEST_POINT; a person without any point is not there.

    Args:
        keypoints: a list of frames, or a single one.
        name: the input's name, for errors.
        canvas: (width, height) where no frame states a canvas; else frames without one take the first stated.

    Returns:
        One Frame per picture.

    Raises:
        ValueError: no frames, other types than these, a wrong number of points, or no usable canvas.
    """
    entries = [keypoints] if isinstance(keypoints, dict) else _expect(list, keypoints, name)
    entries = [_expect(dict, entry, f"{name}, frame {i}") for i, entry in enumerate(entries)]
    if not entries:
        raise ValueError(f"{name} holds no frames: connect the keypoints of a pose estimation node.")

    sizes = [[_read_side(entry, side, f"{name}, frame {i}") for side in CANVAS] for i, entry in enumerate(entries)]
    canvas = next((size for size in sizes if all(size)), canvas)
    if canvas is None:
        raise ValueError(f"{name} states no canvas size: add canvas_width and canvas_height to its frames.")
    sizes = [size if all(size) else canvas for size in sizes]

    people = [_read_people(entry, f"{name}, frame {i}") for i, entry in enumerate(entries)]
    parts = [points for frame in people for person in frame for points in person.values()]
    in_pixels = any(_beyond_fractions(points[:, :2], max(map(max, sizes))) for points in parts)
    for size, frame in zip(sizes, people, strict=True):
        for person in frame:
            for points in person.values():
                points[:, :2] /= size if in_pixels else (1, 1)
                points[(np.abs(points) > LARGEST_POINT).any(axis=1)] = 0
    people = [[person for person in frame if any(points.any() for points in person.values())] for frame in people]
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


def _expect(kind: type, value, where: str):
    """``value``, or an empty one for None. ValueError: it is neither a ``kind`` nor None."""
    if value is None:
        return kind()
    if not isinstance(value, (list, tuple) if kind is list else kind):
        raise ValueError(
            f"{where} is a {type(value).__name__} where a {kind.__name__} is expected: "
            "connect the keypoints of a pose estimation node."
        )
    return value


def _read_side(entry: dict, side: str, where: str) -> int:
    """One side of the canvas in pixels, 0 where it is not stated."""
    value = entry.get(side)
    try:
        pixels = 0 if value is None else int(value)
    except (TypeError, ValueError, OverflowError):
        pixels = -1
    if not 0 <= pixels <= LARGEST_CANVAS:
        raise ValueError(
            f"{where}: {side} is {str(value)[:20]!r} where 1 to {LARGEST_CANVAS} pixels are expected: "
            "state the size of the picture that the keypoints are of."
        )
    return pixels


def _beyond_fractions(coordinates: np.ndarray, longest_side: int) -> bool:
    """Whether a coordinate is too large for a fraction of a canvas, but not for a pixel of it."""
    distances = np.abs(coordinates)
    return bool(((distances > LARGEST_FRACTION) & (distances <= LARGEST_POINT[0] * longest_side)).any())


def _read_people(entry: dict, where: str) -> list[dict[str, np.ndarray]]:
    people = _expect(list, entry.get("people"), f"{where}: people")
    return [_read_person(person, f"{where}, person {i}") for i, person in enumerate(people)]


def _read_person(person: dict | None, name: str) -> dict[str, np.ndarray]:
    person = _expect(dict, person, name)
    parts = {part: _read_points(person, part, name) for part in POINT_COUNTS}
    if len(parts[FACE]) == FACE_LANDMARKS:
        parts[FACE] = np.concatenate([parts[FACE], parts[BODY][EYES]])
    return parts


def _read_points(person: dict, part: str, name: str) -> np.ndarray:
    count = POINT_COUNTS[part]
    try:
        numbers = np.array([] if person.get(part) is None else person[part], dtype=np.float64).ravel()
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"{name}: {part} holds something other than numbers (x, y and score of {count} points): "
            "connect the keypoints of a pose estimation node."
        ) from None
    if not numbers.size:
        return np.zeros((count, 3))
    if numbers.size != 3 * count and not (part == FACE and numbers.size == 3 * FACE_LANDMARKS):
        raise ValueError(
            f"{name}: {part} holds {numbers.size} numbers instead of {3 * count} (x, y and score of {count} points): "
            "use a pose node that gives OpenPose's 18 body joints."
        )
    points = numbers.reshape(-1, 3)
    points[(points <= 0).all(axis=1) | ~np.isfinite(points).all(axis=1)] = 0
    return points
