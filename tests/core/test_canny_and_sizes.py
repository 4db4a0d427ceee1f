"""The Canny condition and the sizes, by the reference's rules."""

import cv2
import numpy as np
import pytest
import torch

from controlnext_core.canny import auto_thresholds, canny
from controlnext_core.sizes import as_rgb, crop, halved


def photo():
    """A smooth scene with edges of many strengths."""
    y, x = np.mgrid[0:96, 0:128]
    gray = 90 + 60 * np.sin(x / 9.0) + 40 * ((x - 64) ** 2 + (y - 48) ** 2 < 900) + y * 0.3
    return np.repeat(np.clip(gray, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize("value, expected", [(0, (0, 0)), (100, (67, 133)), (200, (134, 255)), (255, (170, 255))])
def test_auto_thresholds_are_the_references(value, expected):
    assert auto_thresholds(np.full((4, 4), value, np.uint8)) == expected


def test_auto_is_cv2_canny_at_the_medians_thresholds_without_blur():
    image = photo()
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    median = np.median(gray)
    expected = cv2.Canny(gray, int(max(0, 0.67 * median)), int(min(255, 1.33 * median)))
    edges = canny(image)
    assert edges.shape == image.shape
    assert (edges == expected[..., None]).all()
    assert 0 < (edges > 0).mean() < 0.5


def test_manual_thresholds_are_used():
    image = photo()
    assert (canny(image, (10, 20)) > 0).sum() > (canny(image, (200, 250)) > 0).sum()


def test_gray_is_repeated_and_alpha_dropped():
    rgba = torch.rand(1, 2, 2, 4)
    assert torch.equal(as_rgb(rgba), rgba[..., :3])
    gray = torch.rand(1, 2, 2, 1)
    assert torch.equal(as_rgb(gray), gray.repeat(1, 1, 1, 3))


def test_strided_convolutions_round_up():
    assert halved((65, 64), 0) == (65, 64)
    assert halved((65, 64), 1) == (33, 32)
    assert halved((65, 64), 3) == (9, 8)


def test_crop_follows_the_latent_area():
    image = torch.arange(64 * 64.0).reshape(1, 1, 64, 64)
    assert torch.equal(crop(image, (4, 2, 1, 3), 8), image[..., 8:40, 24:40])
