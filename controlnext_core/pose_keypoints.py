"""POSE_KEYPOINT, the pose format that ComfyUI's pose nodes share, read into arrays and written back."""

import logging
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

BODY = "pose_keypoints_2d"
FEET = "foot_keypoints_2d"
FACE = "face_keypoints_2d"
LEFT_HAND = "hand_left_keypoints_2d"
RIGHT_HAND = "hand_right_keypoints_2d"
CANVAS = ("canvas_width", "canvas_height")
POINT_COUNTS = {BODY: 18, FEET: 6, FACE: 70, LEFT_HAND: 21, RIGHT_HAND: 21}
NECK, SHOULDERS, EYES = 1, [2, 5], [14, 15]  # joints of the body

# A face's 70 points are 68 landmarks and the eyes of the body; some files hold only the landmarks. OpenPose's node
# skips the points that it did not find and adds the place where it sees background most.
FACE_LANDMARKS = 68
MOST_FACE_POINTS = 71

# Fractions of the canvas may lie a little outside it; a person within two pixels is no person.
LARGEST_FRACTION = 2.0
TELLING_POINTS = 3
# What lies this many canvases off, or scores so high, is no detection.
LARGEST_DISTANCE, LARGEST_SCORE = 10.0, 100.0
LARGEST_CANVAS = 16384  # as of ComfyUI's pictures

# OpenPose writes pixel -1 for what it did not find, also as a fraction of the canvas, padded to 64s of pixels.
MARK, PADDING, ROUNDING = -1.0, 64, 1e-4


class Frame(NamedTuple):
    """The people of one picture.

    ``people`` holds, for each person, every key of POINT_COUNTS with a float64 array (points, 3) of x, y and score; x
    and y are fractions of the canvas (0 to 1 inside it), and a point that was not found is all zeros.
    """

    width: int
    height: int
    people: list[dict[str, np.ndarray]]


def read_pose_keypoints(keypoints: list | dict | None, name: str, canvas: tuple[int, int] | None = None) -> list[Frame]:
    """Read what SDPose, DWPose and OpenPose nodes and pose editors give, and hand-written JSON.

    Frames, people, their parts and single points may be None or missing. A point was not found if its score is 0 or
    less, a coordinate is pixel -1, both are 0, a number is not finite, or it lies beyond LARGEST_DISTANCE or
    LARGEST_SCORE; but a neck in the middle of the shoulders stays with score 0, as detectors put it between doubtful
    shoulders. A person without any point is not there.

    Each part of each person is in pixels or in fractions of the canvas. One with too few points to tell is in fractions
    if that puts it on the canvas or nothing else is in pixels.

    A face of up to MOST_FACE_POINTS keeps them in their order; other faces are left out, with one line in the log.

    Args:
        keypoints: a list of frames, or a single one.
        name: the input's name, for errors.
        canvas: (width, height) where no frame states a canvas; else frames without one take the first stated.

    Returns:
        One Frame per picture.

    Raises:
        ValueError: no frames, other types than these, poses of something other than people, a wrong number of points
            in a part other than the face, or no usable canvas.
    """
    entries = [keypoints] if isinstance(keypoints, dict) else _expect(list, keypoints, name)
    entries = [_expect(dict, entry, f"{name}, frame {i}") for i, entry in enumerate(entries)]
    if not entries:
        raise ValueError(f"{name} holds no frames: connect the keypoints of a pose estimation node.")

    sizes = [_read_sides(entry, f"{name}, frame {i}") for i, entry in enumerate(entries)]
    canvas = next((size for size in sizes if all(size)), canvas)
    if canvas is None:
        raise ValueError(f"{name} states no canvas size: add canvas_width and canvas_height to its frames.")
    sizes = [size if all(size) else canvas for size in sizes]

    people = [_read_people(entry, f"{name}, frame {i}") for i, entry in enumerate(entries)]
    everybody = [person for frame in people for person in frame]
    canvases = [size for size, frame in zip(sizes, people, strict=True) for _ in frame]
    _leave_out_other_faces(everybody, name)
    for person, size in zip(everybody, canvases, strict=True):
        for part, points in person.items():
            points[_is_missing(points, part, size)] = 0

    _turn_into_fractions(everybody, canvases)
    for person in everybody:
        person[FACE] = _complete_face(person[FACE], person[BODY][EYES])

    return [Frame(*size, list(filter(_is_there, frame))) for size, frame in zip(sizes, people, strict=True)]


def write_pose_keypoints(frames: list[Frame]) -> list[dict]:
    """The frames as POSE_KEYPOINT, in pixels, with all parts of each person, as ComfyUI's own drawing node needs."""
    return [{"canvas_width": frame.width, "canvas_height": frame.height,
             "people": [_in_pixels(person, frame.width, frame.height) for person in frame.people]} for frame in frames]


def _in_pixels(person: dict[str, np.ndarray], width: int, height: int) -> dict[str, list[float]]:
    return {part: (points * (width, height, 1)).ravel().tolist() for part, points in person.items()}


def _is_there(person: dict[str, np.ndarray]) -> bool:
    return any(points.any() for points in person.values())


def read_pixels(value, name: str, allowed: range, expected: str) -> int:
    """``value`` as a whole number. ValueError, which says what is ``expected``: it is none, or none of ``allowed``."""
    try:
        pixels = int(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pixels = None
    if pixels not in allowed:
        raise ValueError(f"{name} is {str(value)[:20]!r} where {expected}.")
    return pixels


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


def _expect_one_of(wanted: Iterable[str], holder: dict, where: str, lacking: str) -> None:
    """ValueError: ``holder`` holds data, but nothing under a ``wanted`` name."""
    data = [key for key, value in holder.items() if isinstance(value, (list, tuple, dict, np.ndarray))]
    if data and not holder.keys() & wanted:
        raise ValueError(
            f"{where} holds {str(data)[:80]} and {lacking}: "
            "connect the keypoints of a node that finds people's poses, such as DWPose, OpenPose or SDPose."
        )


def _read_sides(entry: dict, where: str) -> list[int]:
    """Width and height of the canvas in pixels."""
    return [_read_side(entry, side, where) for side in CANVAS]


def _read_side(entry: dict, side: str, where: str) -> int:
    """One side of the canvas in pixels, 0 where it is not stated."""
    value = entry.get(side)
    expected = f"1 to {LARGEST_CANVAS} pixels are expected: state the size of the picture that the keypoints are of"
    return 0 if value is None else read_pixels(value, f"{where}: {side}", range(LARGEST_CANVAS + 1), expected)


def _read_people(entry: dict, where: str) -> list[dict[str, np.ndarray | None]]:
    people = _expect(list, entry.get("people"), f"{where}: people")
    animals = entry.get("animals")
    only_animals = not people and isinstance(animals, list) and animals
    _expect_one_of(set() if only_animals else {"people"}, entry, where, "no people")
    return [_read_person(person, f"{where}, person {i}") for i, person in enumerate(people)]


def _read_person(person: dict | None, name: str) -> dict[str, np.ndarray | None]:
    """Points as they are written; None for a face that is no face of OpenPose's."""
    person = _expect(dict, person, name)
    _expect_one_of(POINT_COUNTS, person, name, f"no {BODY}, face or hands")
    return {part: _read_points(person.get(part), part, name) for part in POINT_COUNTS}


def _read_points(value, part: str, name: str) -> np.ndarray | None:
    count = POINT_COUNTS[part]
    try:
        numbers = np.array(_spell_out_missing(value), dtype=np.float64).ravel()
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ValueError(
            f"{name}: {part} holds something other than numbers (x, y and score of {count} points): "
            "connect the keypoints of a pose estimation node."
        ) from None
    if not np.isfinite(numbers).any():
        return np.zeros((count, 3))

    if part == FACE and (numbers.size % 3 or numbers.size > 3 * MOST_FACE_POINTS):
        return None
    if part != FACE and numbers.size != 3 * count:
        raise ValueError(
            f"{name}: {part} holds {numbers.size} numbers instead of {3 * count} (x, y and score of {count} points): "
            f"use a pose node that gives OpenPose's {count} points."
        )
    return numbers.reshape(-1, 3)


def _spell_out_missing(value):
    """A list of points with numbers for those that are None or empty; anything else as it is, None as no numbers."""
    if value is None:
        return []
    if not isinstance(value, (list, tuple)) or not any(isinstance(entry, (list, tuple, np.ndarray)) for entry in value):
        return value
    return [(0, 0, 0) if entry is None or np.size(entry) == 0 else entry for entry in value]


def _leave_out_other_faces(everybody: list[dict[str, np.ndarray | None]], name: str) -> None:
    """Put a face without points, in place, where one could not be read."""
    others = [person for person in everybody if person[FACE] is None]
    for person in others:
        person[FACE] = np.zeros((POINT_COUNTS[FACE], 3))
    if others:
        logging.warning(
            "ControlNeXt: %s: %d of %d faces are left out, since they are not x, y and score of OpenPose's 70 points.",
            name, len(others), len(everybody),
        )


def _is_missing(points: np.ndarray, part: str, size: list[int]) -> np.ndarray:
    """Which points, in whatever unit, were not found on a canvas of ``size`` (width, height)."""
    farthest = LARGEST_DISTANCE * max(size)
    impossible = ~(np.abs(points) <= (farthest, farthest, LARGEST_SCORE)).all(axis=1)
    padded = [-(-side // PADDING) * PADDING for side in size]
    marks = MARK / np.array([(1, 1), size, padded])
    marked = (np.abs(points[:, None, :2] - marks) <= ROUNDING * np.abs(marks)).any(axis=(1, 2))

    unscored = points[:, 2] <= 0
    missing = impossible | marked | unscored
    if part == BODY and unscored[NECK] and not missing[SHOULDERS].any():
        missing[NECK] = not np.allclose(points[NECK, :2], points[SHOULDERS, :2].mean(axis=0))
    return missing


def _turn_into_fractions(everybody: list[dict[str, np.ndarray]], canvases: list[list[int]]) -> None:
    """In place; ``canvases`` holds (width, height) for each person."""
    everything = [points for person in everybody for points in person.values()]
    sizes = [size for person, size in zip(everybody, canvases, strict=True) for _ in person]
    units = [_is_in_pixels(points) for points in everything]
    some_pixels = True in units
    for points, size, in_pixels in zip(everything, sizes, units, strict=True):
        if in_pixels is None:
            in_pixels = some_pixels and points[:, :2].max() >= 1
        points[:, :2] /= size if in_pixels else (1, 1)

        pixels = points[:, :2] * size
        points[((pixels >= MARK - ROUNDING) & (pixels <= 0)).all(axis=1)] = 0
        points[(np.abs(points[:, :2]) > LARGEST_DISTANCE).any(axis=1)] = 0


def _is_in_pixels(points: np.ndarray) -> bool | None:
    """Whether the points that were found are in pixels rather than fractions; None where too few tell."""
    distances = np.abs(points[:, :2]).max(axis=1)
    near = (distances <= LARGEST_FRACTION) & (points[:, :2] > 0).any(axis=1)
    pixels, fractions = np.count_nonzero(distances > LARGEST_FRACTION), np.unique(distances[near]).size
    if pixels and pixels >= fractions:
        return True
    return False if fractions >= TELLING_POINTS else None


def _complete_face(face: np.ndarray, eyes: np.ndarray) -> np.ndarray:
    """A face of 70 points: of the 68 landmarks with the body's ``eyes``, of others with missing points at the end."""
    if len(face) == FACE_LANDMARKS:
        return np.concatenate([face, eyes])
    complete = np.zeros((POINT_COUNTS[FACE], 3))
    complete[: len(face)] = face[: len(complete)]
    return complete
