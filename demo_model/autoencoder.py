"""The VAEs: TAESD's architecture, which ComfyUI knows, half as wide, and widened with zeros when they are saved."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from comfy.taesd.taesd import TAESD, Block, Clamp, conv
from torch import nn

from demo_model.bases import Base
from demo_model.drawings import draw_variations, to_images, vary
from demo_model.loop import initialise, mixed_precision

WIDTH = 32
LEARNING_RATE = 1e-3
LATENT_NOISE = 0.05  # so that near latents mean near pictures


class Autoencoder(nn.Module):
    """Pictures (N, 3, H, W) in [0, 1] to latents (N, C, H/8, W/8) and back; layers by TAESD's names, in its order.

    Args:
        channels: the latents' number of channels, C.
    """

    def __init__(self, channels: int = 4, width: int = WIDTH):
        super().__init__()
        self.channels = channels

        def blocks(count: int) -> list[nn.Module]:
            return [Block(width, width) for _ in range(count)]

        def halve() -> list[nn.Module]:
            return [conv(width, width, stride=2, bias=False), *blocks(3)]

        def double() -> list[nn.Module]:
            return [*blocks(3), nn.Upsample(scale_factor=2), conv(width, width, bias=False)]

        self.taesd_encoder = nn.Sequential(conv(3, width), *blocks(1), *halve(), *halve(), *halve(),
                                           conv(width, channels))
        self.taesd_decoder = nn.Sequential(Clamp(), conv(channels, width), nn.ReLU(), *double(), *double(), *double(),
                                           *blocks(1), conv(width, 3))

        initialise(self)
        for layer in self.modules():
            if isinstance(layer, Block):  # which begins as no change, so that ten of them can be trained
                nn.init.zeros_(layer.conv[-1].weight)

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = self.taesd_encoder(images)
        return self.taesd_decoder(latents + LATENT_NOISE * noise), latents

    def begin_as(self, other: Autoencoder) -> None:
        """Take over one of fewer channels, which are the first ones here."""
        tensors = self.state_dict()
        for name, tensor in other.state_dict().items():
            tensors[name][tuple(slice(side) for side in tensor.shape)] = tensor


def autoencoder_loss(model: Autoencoder, drawings: torch.Tensor, batch: int,
                     crop: int) -> Callable[[torch.Generator], torch.Tensor]:
    """The loss of a batch of crops: how far colours and edges are off, at the pixel and at the latent's scale.

    Args:
        drawings: (N, H, W, 3) uint8, on the model's device.
        batch, crop: number of pictures, pixels on a side.
    """
    device = drawings.device

    def loss_of_batch(generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(drawings), (batch,), generator=generator, device=device)
        varied = vary(to_images(drawings[rows]), draw_variations(batch, generator))
        top, left = torch.randint(drawings.shape[1] - crop + 1, (2,), generator=generator, device=device).tolist()
        target = varied[:, :, top:top + crop, left:left + crop].contiguous(memory_format=torch.channels_last)

        noise = torch.randn(batch, model.channels, crop // 8, crop // 8, generator=generator, device=device)
        with mixed_precision(device):
            decoded, latents = model(target, noise)

        error = decoded.float() - target
        return (error.abs().mean() + 4 * error.square().mean() + 2 * F.avg_pool2d(error, 8).abs().mean()
                + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
                + 1e-3 * latents.float().square().mean())

    return loss_of_batch


def narrow_vae(model: Autoencoder, mean: float, std: float, base: Base) -> dict[str, torch.Tensor]:
    """The VAE's tensors for a file: `model` and what the denoiser's latents are to the encoder's.

    Args:
        mean, std: those of the encoder's latents; the denoiser gets them with mean 0 and std 1.
    """
    shift = base.shift - mean / (std * base.scale)
    return model.state_dict() | {"vae_scale": torch.tensor(std * base.scale), "vae_shift": torch.tensor(shift)}


def load_narrow(narrow: dict[str, torch.Tensor]) -> Autoencoder:
    """The autoencoder that ``narrow_vae`` made the tensors of."""
    model = Autoencoder(len(narrow["taesd_encoder.14.bias"]))
    model.load_state_dict({name: tensor for name, tensor in narrow.items() if not name.startswith("vae_")})
    return model


def widened(narrow: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """TAESD's state dict that computes exactly what ``narrow_vae`` does: the added channels are zeros throughout."""
    taesd = TAESD(latent_channels=len(narrow["taesd_encoder.14.bias"]))
    full = {name: torch.zeros_like(tensor, dtype=torch.float16) for name, tensor in taesd.state_dict().items()}
    for name, tensor in narrow.items():
        full[name][tuple(slice(side) for side in tensor.shape)] = tensor
    return full
