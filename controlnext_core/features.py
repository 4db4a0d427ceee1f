"""Control features, the same in sampling and in training, and how a denoiser under training gets them."""

import torch

from .cross_normalization import add_controls, fit
from .families import Family
from .module import ControlNeXtModule


def control_features(module: ControlNeXtModule, family: Family, image: torch.Tensor, timestep: torch.Tensor,
                     size: tuple[int, int], zero_convolution: bool = False, together: bool = False) -> torch.Tensor:
    """Features (N, out, H, W) at the denoiser's size, standardized unless ``zero_convolution``; differentiable.

    The same steps as in sampling, so that what is trained is what is applied.

    Args:
        image: control images (N, 3, h, w) in [0, 1], RGB, in the compute dtype.
        timestep: the denoiser's own, (N,) or (1,) for all.
        size: (H, W) of the denoiser's features at the place of injection.
        together: the images share one latent frame of a video: (1, out, H, W) of their mean.
    """
    part = module.image_part(image, family.stem_padding, family.stem_pool)
    features = module.timestep_part(part, timestep, size if family.pool_first or zero_convolution else None)
    if together:
        features = features.mean(0, keepdim=True)
    return features if zero_convolution else fit(features, size, family.pool_first, family.eps)


def add_features(h: torch.Tensor, features: torch.Tensor, gain: float | torch.Tensor = 1.0,
                 zero_convolution: bool = False) -> torch.Tensor:
    """Denoiser features (N, C, H, W) with ``control_features`` added: cross-normalized to h, or as they are."""
    if zero_convolution:
        return h + gain * features
    return add_controls(h, [(features[None], h.new_ones(1, 1, 1, 1, 1) * gain)])
