"""The UNet: by its widths one of the SD1.5 family, with one level of few blocks; and its training, alone or controlled.

ComfyUI tells SD1.5 by its 320 channels and the text's 768, whatever the number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from demo_model.loop import initialise, mixed_precision
from demo_model.samples import TIMESTEPS, Samples

UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "context_dim": 768, "num_heads": 8,
    "use_spatial_transformer": True, "channel_mult": (1,), "num_res_blocks": (1,), "transformer_depth": [1],
    "transformer_depth_output": [0, 0], "transformer_depth_middle": -2,
}
LEARNING_RATE = 8e-4
DROPPED_CAPTIONS = 0.1
SNR_LIMIT = 5.0  # min-SNR weighting (arXiv 2303.09556)
SNR_OFFSET = 0.2  # without it the shape of the whole, which is fixed in the most noise, is hardly learned
# share of signal left at each timestep of SD1.5's schedule
ALPHAS = torch.cumprod(1 - torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, TIMESTEPS, dtype=torch.float64) ** 2, 0).float()


def new_unet() -> UNetModel:
    """A fresh UNet in float32 whose blocks begin as no change."""
    torch.manual_seed(0)
    unet = UNetModel(**UNET, dtype=torch.float32)
    initialise(unet)
    for name, parameter in unet.named_parameters():
        if name.startswith("out.2.") or ".out_layers.3." in name or ".proj_out." in name:
            torch.nn.init.zeros_(parameter)
    return unet


def denoising_loss(predict: Callable, samples: Samples, batch: int, dropped: float = DROPPED_CAPTIONS,
                   snr_limit: float = SNR_LIMIT, swapped: float = 0.0,
                   teacher: Callable | None = None) -> Callable[[torch.Generator], torch.Tensor]:
    """The loss of a batch for ``predict(x, timestep, caption, control image) -> noise``.

    Args:
        batch: number of samples.
        dropped, swapped: shares of the captions that are replaced by the empty one, and by another drawing's.
        snr_limit: the most that a sample's error in x0 weighs, which is its signal-to-noise ratio + SNR_OFFSET; low
            for coarse structure.
        teacher: like ``predict``; what it predicts is then to be met, not the noise itself.
    """
    def loss_of_batch(generator: torch.Generator) -> torch.Tensor:
        x0, caption, image, noise, level = samples.batch(generator, dropped, swapped, batch)
        timestep = (level * TIMESTEPS).long().clamp(max=TIMESTEPS - 1)
        alpha = ALPHAS.to(samples.device)[timestep]
        x = alpha.sqrt()[:, None, None, None] * x0 + (1 - alpha).sqrt()[:, None, None, None] * noise

        with mixed_precision(samples.device):
            predicted = predict(x, timestep.float(), caption.float(), image)
            if teacher is not None:
                with torch.no_grad():
                    noise = teacher(x, timestep.float(), caption.float(), image).float()

        snr = alpha / (1 - alpha)
        error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        return (error * (snr + SNR_OFFSET).clamp(max=snr_limit) / snr).mean()

    return loss_of_batch
