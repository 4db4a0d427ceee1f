"""The UNet: of the SD1.5 family by its widths, one level of few blocks; and how it is trained, alone or controlled.

ComfyUI tells SD1.5 by its 320 channels and the text's 768, whatever the number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from loop import initialise
from world import World

UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "context_dim": 768, "num_heads": 8,
    "use_spatial_transformer": True, "channel_mult": (1,), "num_res_blocks": (1,), "transformer_depth": [1],
    "transformer_depth_output": [0, 0], "transformer_depth_middle": -2,
}
BATCH = 16
LEARNING_RATE = 8e-4
DROPPED_CAPTIONS = 0.1
SNR_LIMIT = 5.0  # min-SNR weighting (arXiv 2303.09556)
# SD1.5's schedule: share of signal left at each of its timesteps
ALPHAS = torch.cumprod(1 - torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2, 0).float()


def new_unet() -> UNetModel:
    """A fresh UNet in float32 whose blocks begin as no change."""
    torch.manual_seed(0)
    unet = UNetModel(**UNET, dtype=torch.float32)
    initialise(unet)
    for name, parameter in unet.named_parameters():
        if name.startswith("out.2.") or ".out_layers.3." in name or ".proj_out." in name:
            torch.nn.init.zeros_(parameter)
    return unet


class Samples:
    """Latents of varied drawings, their captions and their control images, in batches.

    Args:
        latents: (N, K, 4, h, w) of K variations of each drawing, with deviation 1.
        captions: (N + 1, 77, 768), the last of an empty text.
        controls: (N, K, H, W) bool, or None without control.
        world: tells which drawings training may see.
    """

    def __init__(self, latents: torch.Tensor, captions: torch.Tensor, controls: torch.Tensor | None, world: World):
        self.latents, self.captions, self.controls = latents, captions, controls
        self.training = torch.from_numpy(world.training)

    def batch(self, generator: torch.Generator, dropped: float) -> tuple[torch.Tensor, ...]:
        """(x0, caption, control image or None, noise, timestep) of BATCH samples; timesteps spread evenly."""
        rows = self.training[torch.randint(len(self.training), (BATCH,), generator=generator)]
        columns = torch.randint(self.latents.shape[1], (BATCH,), generator=generator)
        captioned = torch.where(torch.rand(BATCH, generator=generator) < dropped, len(self.captions) - 1, rows)
        noise = torch.randn(BATCH, *self.latents.shape[2:], generator=generator)
        spread = (torch.randperm(BATCH, generator=generator) + torch.rand(BATCH, generator=generator)) / BATCH
        images = None
        if self.controls is not None:
            images = self.controls[rows, columns].float()[:, None].expand(-1, 3, -1, -1)
        return (self.latents[rows, columns], self.captions[captioned].float(), images, noise,
                (spread * len(ALPHAS)).long().clamp(max=len(ALPHAS) - 1))


def denoising_loss(predict: Callable, samples: Samples, device: torch.device,
                   dropped: float = DROPPED_CAPTIONS) -> Callable[[torch.Generator], torch.Tensor]:
    """The loss of a batch for ``predict(x, timestep, caption, control image) -> noise``."""
    def loss_of_batch(generator: torch.Generator) -> torch.Tensor:
        x0, caption, image, noise, timestep = (
            value if value is None else value.to(device) for value in samples.batch(generator, dropped))
        alpha = ALPHAS.to(device)[timestep]
        x = alpha.sqrt()[:, None, None, None] * x0 + (1 - alpha).sqrt()[:, None, None, None] * noise
        with torch.autocast(device.type, torch.bfloat16):
            predicted = predict(x, timestep.float(), caption, image)
        snr = alpha / (1 - alpha)
        error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        return (error * snr.clamp(max=SNR_LIMIT) / snr).mean()

    return loss_of_batch
