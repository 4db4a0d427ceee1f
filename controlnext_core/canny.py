"""The Canny condition that the SDXL weights were trained with."""

import cv2
import numpy as np
import torch

from .sizes import as_bytes, as_rgb


def auto_thresholds(gray: np.ndarray) -> tuple[int, int]:
    """The reference's thresholds of a gray uint8 image: 0.67 and 1.33 times its median, kept within 0 to 255."""
    median = np.median(gray)
    return int(max(0, 0.67 * median)), int(min(255, 1.33 * median))


def canny(rgb: np.ndarray, thresholds: tuple[int, int] | None = None) -> np.ndarray:
    """White edges on black.

    Args:
        rgb: (H, W, 3) uint8.
        thresholds: (low, high) of the hysteresis, 0 to 255; None takes ``auto_thresholds``.

    Returns:
        (H, W, 3) uint8, 0 or 255, as the reference's preprocessor (no blur).
    """
    gray = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    low, high = auto_thresholds(gray) if thresholds is None else thresholds
    return cv2.cvtColor(cv2.Canny(gray, low, high), cv2.COLOR_GRAY2RGB)


def edges(images: torch.Tensor, thresholds: tuple[int, int] | None = None) -> torch.Tensor:
    """``canny`` of images (N, H, W, C) in [0, 1], one by one: (N, H, W, 3), 0 or 1, float32 on the host."""
    found = [canny(picture, thresholds) for picture in as_bytes(as_rgb(images))]
    return torch.from_numpy(np.stack(found)).float() / 255
