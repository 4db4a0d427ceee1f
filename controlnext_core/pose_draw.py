"""Drawing poses as the pictures that ControlNeXt's video models were trained on, or in OpenPose's usual look."""

import colorsys
import math

import cv2
import numpy as np

from .pose_keypoints import BODY, FACE, FACE_LANDMARKS, LEFT_HAND, RIGHT_HAND, Frame, read_pixels

COLORS = ("controlnext", "openpose")

LIMBS = [
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),
    (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
]
JOINT_COLORS = [
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85),
    (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255),
    (255, 0, 170), (255, 0, 85),
]
LIMB_COLORS = JOINT_COLORS[: len(LIMBS)]
HAND_EDGES = [
    (0, 1), (1, 2), (2, 3), (3, 4), (0, 5), (5, 6), (6, 7), (7, 8), (0, 9), (9, 10), (10, 11), (11, 12),
    (0, 13), (13, 14), (14, 15), (15, 16), (0, 17), (17, 18), (18, 19), (19, 20),
]

MIN_SCORE = 0.3
STICK_WIDTH = 4  # half the width of limbs and the radius of joints, in pixels, as trained
WIDEST_STICK = 100
LIMB_DIMMING = 0.6
# The reference draws in fixed line widths on a canvas with this short side, then scales the picture down.
DRAWING_SIZE = 2160
LONGEST_SIDE = 32768  # of that canvas: a strip of one pixel would make it take all memory


def draw_pose(
    frame: Frame,
    width: int,
    height: int,
    colors: str = "controlnext",
    draw_body: bool = True,
    draw_hands: bool = True,
    draw_face: bool = True,
    stick_width: int = STICK_WIDTH,
) -> np.ndarray:
    """The people of one frame on black, stretched to width and height.

    ``controlnext`` is the reference implementation's picture, which the video weights know: thin lines, colours
    weighted by the scores, red and blue swapped. ``openpose`` is the usual look: the same figure in full colours and
    lines of full width, of the points that score 0.3 or more.

    Args:
        frame: coordinates in fractions of the canvas.
        colors: one of COLORS.
        stick_width: half the width of limbs and the radius of joints in pixels, 1 to WIDEST_STICK: of the picture in
            ``openpose``, of a picture with a short side of DRAWING_SIZE in ``controlnext``.

    Returns:
        (height, width, 3) uint8 RGB.

    Raises:
        ValueError: another ``colors`` or ``stick_width``.
    """
    if str(colors) not in COLORS:
        raise ValueError(f"colors is {str(colors)[:20]!r} where one of {', '.join(COLORS)} is expected.")
    stick_width = read_pixels(
        stick_width, "stick_width", range(1, WIDEST_STICK + 1),
        f"1 to {WIDEST_STICK} pixels are expected: {STICK_WIDTH} draws as trained",
    )

    usual_look = colors == "openpose"
    people = frame.people
    if usual_look:
        people = [_certain_parts(person) for person in people]
    scale = 1 if usual_look else min(DRAWING_SIZE / min(height, width), LONGEST_SIDE / max(height, width))
    canvas = np.zeros((int(height * scale), int(width * scale), 3), dtype=np.uint8)

    if draw_body:
        _draw_bodies(canvas, [person[BODY] for person in people], stick_width)
    if draw_hands:
        for hand in [person[part] for part in (LEFT_HAND, RIGHT_HAND) for person in people]:
            _draw_hand(canvas, hand)
    if draw_face:
        for person in people:
            _draw_face(canvas, person[FACE][:FACE_LANDMARKS])

    if usual_look:
        return canvas
    # The reference takes its canvas for BGR: training saw red and blue swapped.
    return cv2.cvtColor(cv2.resize(canvas, (width, height), interpolation=cv2.INTER_LINEAR), cv2.COLOR_BGR2RGB)


def _certain_parts(person: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {part: _certain(points) for part, points in person.items()}


def _certain(points: np.ndarray) -> np.ndarray:
    """The points that score 0.3 or more, with score 1; the others as not found."""
    return np.where(points[:, 2:] >= MIN_SCORE, np.column_stack([points[:, :2], np.ones(len(points))]), 0)


def _pixels(canvas: np.ndarray, points: np.ndarray) -> list[list[int]]:
    """Pixel coordinates (x, y), truncated to int."""
    height, width = canvas.shape[:2]
    return (points[:, :2] * (width, height)).astype(int).tolist()


def _draw_bodies(canvas: np.ndarray, bodies: list[np.ndarray], stick_width: int) -> None:
    height, width = canvas.shape[:2]
    # The same limb of all people before the next limb: what lies on top depends on it.
    for (a, b), color in zip(LIMBS, LIMB_COLORS, strict=True):
        for body in bodies:
            (xa, ya, score_a), (xb, yb, score_b) = (body[[a, b]] * (width, height, 1)).tolist()
            if score_a < MIN_SCORE or score_b < MIN_SCORE:
                continue
            center = int((xa + xb) / 2), int((ya + yb) / 2)
            half_length = int(((xa - xb) ** 2 + (ya - yb) ** 2) ** 0.5 / 2)
            angle = int(math.degrees(math.atan2(ya - yb, xa - xb)))
            # The reference dims the canvas after its limbs; the same pixels come of dimming their colours.
            dimmed = [int(min(255, int(c * (score_a * score_b))) * LIMB_DIMMING) for c in color]
            cv2.fillConvexPoly(canvas, cv2.ellipse2Poly(center, (half_length, stick_width), angle, 0, 360, 1), dimmed)

    for joint, color in enumerate(JOINT_COLORS):
        for body in bodies:
            score = float(body[joint, 2])
            if score > MIN_SCORE:
                (center,) = _pixels(canvas, body[[joint]])
                cv2.circle(canvas, center, stick_width, [int(c * score) for c in color], thickness=-1)


def _draw_hand(canvas: np.ndarray, hand: np.ndarray) -> None:
    pixels, scores = _pixels(canvas, hand), hand[:, 2].tolist()
    for edge, (a, b) in enumerate(HAND_EDGES):
        if min(*pixels[a], *pixels[b]) > 0:
            brightness = int(scores[a] * scores[b] * 255)
            color = [c * brightness for c in colorsys.hsv_to_rgb(edge / len(HAND_EDGES), 1, 1)]
            cv2.line(canvas, pixels[a], pixels[b], color, thickness=2)
    for center, score in zip(pixels, scores, strict=True):
        if min(center) > 0:
            cv2.circle(canvas, center, 4, (0, 0, int(score * 255)), thickness=-1)


def _draw_face(canvas: np.ndarray, landmarks: np.ndarray) -> None:
    for center, score in zip(_pixels(canvas, landmarks), landmarks[:, 2].tolist(), strict=True):
        if min(center) > 0:
            cv2.circle(canvas, center, 3, [int(score * 255)] * 3, thickness=-1)
