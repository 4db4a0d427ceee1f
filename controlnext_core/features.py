"""From an image part to the features that a denoiser gets: sampling and training compute them here, alike."""

from collections.abc import Iterable

import torch

from .cross_normalization import add_controls, fit
from .families import Family
from .module import ControlNeXtModule


def control_features(module: ControlNeXtModule, family: Family,
                     image_parts: Iterable[tuple[torch.Tensor, torch.Tensor]], timestep: torch.Tensor,
                     size: tuple[int, int], zero_convolution: bool = False) -> torch.Tensor:
    """Features (N, out, H, W) at the denoiser's size, standardized unless ``zero_convolution``; differentiable.

    Args:
        image_parts: what ``module.image_part`` gives for N images. Several are of images that share one latent frame of
            a video, whose features are averaged before they are standardized. They are taken one after the other, so
            that a generator of them keeps one in memory.
        timestep: the denoiser's own, (N,) or (1,) for all.
        size: (H, W) of the denoiser's features at the place of injection.
    """
    pooled = size if family.pool_first or zero_convolution else None
    features = _mean(module.timestep_part(part, timestep, pooled) for part in image_parts)
    return features if zero_convolution else fit(features, size, family.pool_first, family.eps)


def _mean(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The mean of tensors that come one after the other; a single one is given back as it is."""
    tensors = iter(tensors)
    total, count = next(tensors), 1
    for tensor in tensors:
        total, count = total + tensor, count + 1
    return total if count == 1 else total / count


def add_features(h: torch.Tensor, features: torch.Tensor, gain: float | torch.Tensor = 1.0,
                 zero_convolution: bool = False) -> torch.Tensor:
    """Denoiser features (N, C, H, W) with ``control_features`` added: cross-normalized to h, or as they are."""
    if zero_convolution:
        return h + gain * features
    return add_controls(h, [(features[None], h.new_ones(1, 1, 1, 1, 1) * gain)])
