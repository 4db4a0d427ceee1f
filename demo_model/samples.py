"""The samples that the denoiser is trained on: latents of varied drawings, their captions and control images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from demo_model.bases import Base
from demo_model.drawings import Drawings, draw_variations, to_drawings, to_images, vary
from demo_model.text import encode_texts

BATCH = 16
UPRIGHT, MIRRORED = 4, 4  # variations of each drawing, in this order
TIMESTEPS = 1000


class Samples:
    """Batches of what training may see.

    Args:
        latents: (N, K, C, h, w), those of K variations of each drawing, with mean 0 and std 1.
        captions: N + 1 encoded texts, which a tensor of rows takes out; the last one is empty.
        controls: (N, K, H, W) bool, or None without control.
        drawings: tell which of them training may see.
    """

    def __init__(self, latents: torch.Tensor, captions: torch.Tensor, controls: torch.Tensor | None,
                 drawings: Drawings):
        self.latents, self.captions, self.controls = latents, captions, controls
        self.training = torch.from_numpy(drawings.training)

    def batch(self, generator: torch.Generator, dropped: float, swapped: float, size: int = BATCH) -> tuple:
        """(x0, caption, control image or None, noise, noise level) of `size` samples; levels spread evenly in [0, 1].

        Args:
            dropped, swapped: shares of the captions that are replaced by the empty one, and by another drawing's.
        """
        rows = self.training[torch.randint(len(self.training), (size,), generator=generator)]
        columns = torch.randint(self.latents.shape[1], (size,), generator=generator)
        others = self.training[torch.randint(len(self.training), (size,), generator=generator)]
        chance = torch.rand(size, generator=generator)

        captioned = torch.where(chance < swapped, others, rows)
        captioned = torch.where(chance >= 1 - dropped, len(self.captions) - 1, captioned)

        noise = torch.randn(size, *self.latents.shape[2:], generator=generator)
        spread = (torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)) / size
        images = None
        if self.controls is not None:
            images = as_image(self.controls[rows, columns])
        return self.latents[rows, columns], self.captions[captioned], images, noise, spread


def as_image(control: torch.Tensor) -> torch.Tensor:
    """(N, H, W) bool to a control image (N, 3, H, W) in [0, 1]."""
    return control.float()[:, None].expand(-1, 3, -1, -1)


def varied_drawings(drawings: Drawings) -> list[torch.Tensor]:
    """A tensor (UPRIGHT + MIRRORED, 3, SIZE, SIZE) for each drawing; always the same ones."""
    generator, count = torch.Generator().manual_seed(0), len(drawings.captions)
    maps = torch.cat([draw_variations(count * UPRIGHT, generator, 0.0).unflatten(0, (count, UPRIGHT)),
                      draw_variations(count * MIRRORED, generator, 1.0).unflatten(0, (count, MIRRORED))], 1)
    return [vary(image.expand(UPRIGHT + MIRRORED, -1, -1, -1), maps)
            for image, maps in zip(to_images(drawings.pictures), maps, strict=True)]


def encode(varied: list[torch.Tensor], encoder: nn.Module) -> torch.Tensor:
    """The latents (N, K, C, h, w) of varied drawings, as the encoder makes them."""
    device = next(encoder.parameters()).device
    with torch.no_grad():
        return torch.stack([encoder(batch.to(device)).cpu() for batch in varied])


def control_maps(varied: list[torch.Tensor], control: Callable[[np.ndarray], np.ndarray]) -> torch.Tensor:
    """The maps (N, K, H, W) bool that `control` makes of varied drawings, each (H, W, 3) uint8."""
    def maps_of(batch: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.stack([control(drawing) for drawing in to_drawings(batch)]))

    return torch.stack([maps_of(batch) for batch in varied])


def load_texts(drawings: Drawings, folder: Path, base: Base) -> tuple[torch.Tensor, torch.Tensor]:
    """The encoded captions and, last, the empty one: (N + 1, 77, 768), and pooled (N + 1, 768).

    They are kept in `folder`, for they take minutes.
    """
    file = folder / f"{base.name}_texts.pt"
    if not file.exists():
        torch.save(encode_texts([*drawings.captions, ""], base), file)
    return torch.load(file, weights_only=True)
