"""A small chart of how strongly control acts over the sampling."""

import cv2
import numpy as np

SIZE = (384, 160)  # width, height of the picture
LEFT, TOP, RIGHT, BOTTOM = 40, 12, 372, 136  # of the plot in it
BACKGROUND, GRID, LABEL, LINE, AREA = (32, 32, 32), (72, 72, 72), (190, 190, 190), (120, 200, 255), (44, 78, 104)


def draw_chart(strengths: list[float]) -> np.ndarray:
    """Draw strengths at even distances from the sampling's begin to its end.

    Returns:
        RGB (160, 384, 3) uint8. The scale goes from 0, or the lowest strength if negative, to the highest, at least 1.
    """
    low, high = min(0.0, *strengths), max(1.0, *strengths)

    def height(strength: float) -> int:
        return round(BOTTOM - (strength - low) / (high - low) * (BOTTOM - TOP))

    picture = np.full((SIZE[1], SIZE[0], 3), BACKGROUND, np.uint8)
    xs = np.linspace(LEFT, RIGHT, len(strengths)).round()
    line = np.stack([xs, [height(strength) for strength in strengths]], axis=1).astype(np.int32)
    area = np.concatenate([line, [[RIGHT, height(0.0)], [LEFT, height(0.0)]]]).astype(np.int32)
    cv2.fillPoly(picture, [area], AREA)
    for level in dict.fromkeys((low, 0.0, high)):
        cv2.line(picture, (LEFT, height(level)), (RIGHT, height(level)), GRID)
        _label(picture, f"{level:.3g}", (4, height(level) + 4))
    cv2.polylines(picture, [line], False, LINE, 2, cv2.LINE_AA)
    _label(picture, "begin", (LEFT, SIZE[1] - 8))
    _label(picture, "end", (RIGHT - 24, SIZE[1] - 8))
    _label(picture, "strength over the sampling", (118, SIZE[1] - 8))
    return picture


def _label(picture: np.ndarray, text: str, corner: tuple[int, int]) -> None:
    cv2.putText(picture, text, corner, cv2.FONT_HERSHEY_SIMPLEX, 0.38, LABEL, 1, cv2.LINE_AA)
