"""Small, worn pictures made of good ones, for training super-resolution."""

import cv2
import numpy as np
import torch

from controlnext_core.degradation import degraded

COUNT = 200
y, x = np.mgrid[0:96, 0:64]
PICTURE = np.stack([255 * (x > 32), 2 * y, 4 * x], axis=2).clip(0, 255).astype(np.uint8)


def drawn(seed: int) -> list[np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    return [degraded(PICTURE, generator) for _ in range(COUNT)]


def test_copies_are_two_to_eight_times_as_small_in_the_picture_s_shape():
    scales = [len(PICTURE) / len(one) for one in drawn(0)]
    assert 2 <= min(scales) < 2.2
    assert 7 < max(scales) <= 8
    assert all(abs(one.shape[0] - 1.5 * one.shape[1]) <= 1.5 for one in drawn(0))
    assert all(one.dtype == np.uint8 and one.shape[2] == 3 for one in drawn(0))


def test_the_same_seed_draws_the_same_and_every_copy_is_another():
    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(np.array_equal(*pair) for pair in zip(first, again, strict=True))
    assert not any(np.array_equal(*pair) for pair in zip(first, other, strict=True))


def test_a_copy_is_still_the_picture_and_some_are_worn_and_some_only_small():
    errors = []
    for one in drawn(2):
        height, width, _ = one.shape
        expected = cv2.resize(PICTURE, (width, height), interpolation=cv2.INTER_AREA)
        errors.append(float(np.abs(one.astype(float) - expected).mean()))
    assert max(errors) < 30
    assert 0.05 < np.mean(np.array(errors) < 4) < 0.6
    assert np.mean(np.array(errors) > 6) > 0.2


def test_a_picture_of_one_pixel_stays_one():
    generator = torch.Generator().manual_seed(3)
    assert all(degraded(PICTURE[:1, :1], generator).shape == (1, 1, 3) for _ in range(20))
