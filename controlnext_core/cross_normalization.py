"""Cross normalization: bring control features c to the statistics of the denoiser's features h, then add them.

The authors' code (ControlNeXt-SD1.5-Training/models/unet.py of github.com/dvlab-research/ControlNeXt) computes

    c' = (c - mean(c)) * std(h) / (std(c) + eps) + mean(h);    h <- h + c' * weight

and the paper (arXiv 2408.06070, section 3.3) writes

    c' = (c - mean(h)) / sqrt(std(h)^2 + eps) * gamma;         h <- h + c'

Here it is the code's formula, since the published weights were trained with it. Its means and unbiased stds are per
sample over (C, H, W). The first factor does not depend on ``h``, so ``standardize`` computes it once and
``add_controls`` only scales, shifts and adds.
"""

import torch
import torch.nn.functional as F


def standardize(control: torch.Tensor, eps: float) -> torch.Tensor:
    """(c - mean(c)) / (std(c) + eps) of control features (N, C, H, W), in their own dtype."""
    wide = control.float()  # what is subtracted and divided by needs more digits than half precision has
    std, mean = torch.std_mean(wide, dim=(1, 2, 3), keepdim=True)
    return ((wide - mean) / (std + eps)).to(control.dtype)


def fit(control: torch.Tensor, size: tuple[int, int], pool_first: bool, eps: float) -> torch.Tensor:
    """Standardized control features at the UNet's size.

    The reference's SD1.5 families pool and then normalize, the others normalize and then pool. Pooling commutes with
    the scale and shift that follow, so both orders end here.

    Args:
        control: features (N, C, h, w).
        size: (H, W) of the denoiser's features at the place of injection.

    Returns:
        (N, C, H, W) in the dtype of ``control``.
    """
    if pool_first:
        return standardize(pool(control, size), eps)
    return pool(standardize(control, eps), size)


def pool(features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Adaptive average pooling of (..., C, h, w) to (..., C, H, W); the same tensor when the size is right already."""
    if features.shape[-2:] == torch.Size(size):
        return features
    return F.adaptive_avg_pool2d(features.flatten(0, -4), size).unflatten(0, features.shape[:-3])


def add_controls(h: torch.Tensor, controls: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Add every control to ``h``, all normalized against the same uncontrolled ``h``, so that their order is free.

    Args:
        h: denoiser features (B, C, H, W), B = guidance halves x samples of each.
        controls: pairs of standardized features (halves or 1, samples or 1, C, H, W) and
            weights (halves, samples or 1, 1, H or 1, W or 1); other sizes are pooled to H x W.

    Returns:
        A new (B, C, H, W) tensor; where a weight is 0 the value of ``h`` is kept.
    """
    halves = controls[0][1].shape[0]
    # torch accumulates them in float32 or more, whatever the dtype of h
    std, mean = (value.unflatten(0, (halves, -1)) for value in torch.std_mean(h, dim=(1, 2, 3), keepdim=True))
    out = h.unflatten(0, (halves, -1))
    for features, weight in controls:
        features = pool(features, h.shape[-2:])
        if weight.shape[-2:] != (1, 1):
            weight = pool(weight, h.shape[-2:])
        # h first: it hands its memory format on, and with it the bits of the untouched samples
        out = torch.addcmul(out, features, std * weight).add_(mean * weight)
    return out.flatten(0, 1)


def add_to_tokens(tokens: torch.Tensor, controls: list[tuple[torch.Tensor, torch.Tensor]],
                  fill: int | None = None) -> torch.Tensor:
    """``add_controls`` for a picture's tokens, row by row, among (B, N, C); H and W are those of the features.

    The others (reference pictures, padding) stay as they are, and out of the statistics.

    Args:
        fill: the picture's tokens are not the first but the last, filled up to a multiple of this.
    """
    size = controls[0][0].shape[-2:]
    count = size.numel()
    start = 0 if fill is None else tokens.shape[1] - (count + -count % fill)
    end = start + count
    h = tokens[:, start:end].transpose(1, 2).unflatten(2, size)
    picture = add_controls(h, controls).flatten(2).transpose(1, 2)
    return picture if count == tokens.shape[1] else torch.cat([tokens[:, :start], picture, tokens[:, end:]], 1)
