"""Small rules for the channels, sizes and parts of control images, as the reference pipelines have them."""

import numpy as np
import torch


def as_bytes(images: torch.Tensor) -> np.ndarray:
    """Images of any shape in [0, 1] as uint8, on the host; values beyond are clamped."""
    return (255 * images).round().clamp(0, 255).byte().cpu().contiguous().numpy()


def as_rgb(image: torch.Tensor) -> torch.Tensor:
    """(N, H, W, C) to (N, H, W, 3): alpha is dropped, gray is repeated."""
    return image[..., :3] if image.shape[-1] >= 3 else image[..., :1].expand(*image.shape[:-1], 3)


def halved(size: tuple[int, int], times: int) -> tuple[int, int]:
    """(H, W) after ``times`` stride-2 convolutions with padding 1: half each time, rounded up."""
    for _ in range(times):
        size = ((size[0] + 1) // 2, (size[1] + 1) // 2)
    return size


def crop(image: torch.Tensor, area: tuple[int, int, int, int], ratio: int) -> torch.Tensor:
    """The part of (N, C, H, W) over a latent ``area`` (height, width, top, left), ``ratio`` pixels a latent one."""
    height, width, top, left = (value * ratio for value in area)
    return image[..., top:top + height, left:left + width]
