"""The VAE: TAESD's architecture, which ComfyUI knows, half as wide, and widened with zeros when it is saved."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from comfy.taesd.taesd import TAESD, Block, Clamp, conv
from torch import nn

from demo_model.loop import initialise
from demo_model.world import draw_variations, vary

WIDTH = 32
BATCH, CROP = 16, 64  # pictures, pixels on a side
LEARNING_RATE = 1e-3
LATENT_NOISE = 0.05  # so that near latents mean near pictures
SD15_SCALE = 0.18215  # from a VAE's latents to the UNet's, in ComfyUI's SD1.5 latent format


class Autoencoder(nn.Module):
    """Pictures (N, 3, H, W) in [0, 1] to latents (N, 4, H/8, W/8) and back; layers by TAESD's names, in its order."""

    def __init__(self, width: int = WIDTH):
        super().__init__()

        def blocks(count: int) -> list[nn.Module]:
            return [Block(width, width) for _ in range(count)]

        def halve() -> list[nn.Module]:
            return [conv(width, width, stride=2, bias=False), *blocks(3)]

        def double() -> list[nn.Module]:
            return [*blocks(3), nn.Upsample(scale_factor=2), conv(width, width, bias=False)]

        self.taesd_encoder = nn.Sequential(conv(3, width), *blocks(1), *halve(), *halve(), *halve(), conv(width, 4))
        self.taesd_decoder = nn.Sequential(Clamp(), conv(4, width), nn.ReLU(), *double(), *double(), *double(),
                                           *blocks(1), conv(width, 3))
        initialise(self)
        for layer in self.modules():
            if isinstance(layer, Block):  # which begins as no change, so that ten of them can be trained
                nn.init.zeros_(layer.conv[-1].weight)

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = self.taesd_encoder(images)
        return self.taesd_decoder(latents + LATENT_NOISE * noise), latents


def autoencoder_loss(model: Autoencoder, images: torch.Tensor) -> Callable[[torch.Generator], torch.Tensor]:
    """The loss of a batch of crops: how far colours and edges are off, at the pixel and at the latent's scale."""
    def loss_of_batch(generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        varied = vary(images[rows], draw_variations(BATCH, generator).to(images.device))
        top, left = torch.randint(images.shape[-1] - CROP + 1, (2,), generator=generator).tolist()
        target = varied[:, :, top:top + CROP, left:left + CROP].contiguous(memory_format=torch.channels_last)
        noise = torch.randn(BATCH, 4, CROP // 8, CROP // 8, generator=generator).to(images.device)
        with torch.autocast(images.device.type, torch.bfloat16):
            decoded, latents = model(target, noise)
        error = decoded.float() - target
        return (error.abs().mean() + 4 * error.square().mean() + 2 * F.avg_pool2d(error, 8).abs().mean()
                + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
                + 1e-3 * latents.float().square().mean())

    return loss_of_batch


def narrow_vae(model: Autoencoder, latent_deviation: float) -> dict[str, torch.Tensor]:
    """The VAE's tensors for a file: `model` and what the UNet's latents are to the encoder's.

    Args:
        latent_deviation: of the encoder's latents; the UNet gets them divided by it.
    """
    scale = torch.tensor(latent_deviation * SD15_SCALE)
    return model.state_dict() | {"vae_scale": scale, "vae_shift": torch.tensor(0.0)}


def widened(narrow: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """TAESD's state dict that computes exactly what ``narrow_vae`` does: the added channels are zeros throughout."""
    full = {name: torch.zeros_like(tensor, dtype=torch.float16) for name, tensor in TAESD().state_dict().items()}
    for name, tensor in narrow.items():
        full[name][tuple(slice(side) for side in tensor.shape)] = tensor
    return full
