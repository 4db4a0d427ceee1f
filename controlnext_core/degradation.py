"""Small, worn pictures made of good ones: the conditions that a ControlNeXt for super-resolution is trained with.

The first order of Real-ESRGAN's degradations (arXiv 2107.10833): blur, downscaling by a random filter, noise, JPEG.
"""

import cv2
import numpy as np
import torch

SCALES = (2.0, 8.0)
FILTERS = (cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_CUBIC)
BLURS = (0.2, 3.0)  # std of the blur, in pixels of the good picture
NOISES = (1.0, 20.0)  # std of the noise; white is 255
QUALITIES = (30, 95)  # JPEG's
EACH = 0.5  # probability of blur, noise and JPEG; so an eighth of the pictures is small and nothing else


def degraded(rgb: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """A picture 2 to 8 times as small, each side at least one pixel.

    Args:
        rgb: (H, W, 3) uint8.
        generator: everything random is drawn from it, so the same state gives the same picture.

    Returns:
        (h, w, 3) uint8.
    """
    height, width, _ = rgb.shape
    if _happens(generator):
        rgb = cv2.GaussianBlur(rgb, (0, 0), _between(*BLURS, generator))

    scale = _between(*SCALES, generator)
    rgb = cv2.resize(rgb, (max(round(width / scale), 1), max(round(height / scale), 1)),
                     interpolation=FILTERS[int(_between(0, len(FILTERS), generator))])

    if _happens(generator):
        noise = _between(*NOISES, generator) * torch.randn(rgb.shape, generator=generator).numpy()
        rgb = (rgb + noise).round().clip(0, 255).astype(np.uint8)

    if _happens(generator):
        _, packed = cv2.imencode(".jpg", rgb, (cv2.IMWRITE_JPEG_QUALITY, round(_between(*QUALITIES, generator))))
        rgb = cv2.imdecode(packed, cv2.IMREAD_COLOR)
    return rgb


def _happens(generator: torch.Generator) -> bool:
    return _between(0, 1, generator) < EACH


def _between(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))
