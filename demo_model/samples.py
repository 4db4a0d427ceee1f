"""The samples that the denoiser is trained on: latents of varied drawings, their captions and control images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from demo_model.bases import Base
from demo_model.drawings import Drawings, draw_variations, to_drawings, to_images, vary
from demo_model.text import encode_texts

AT_ONCE = 64  # drawings whose variations a GPU makes and encodes together
TIMESTEPS = 1000


class Samples:
    """Batches of what training may see, on the device of its latents.

    Args:
        latents: (N, K, C, h, w), those of K variations of each drawing, with mean 0 and std 1.
        captions: the drawings' encoded ``texts``, which a tensor of rows takes out.
        controls: (N, K, H, W) bool, or None without control.
        drawings: tell which of them training may see.
    """

    def __init__(self, latents: torch.Tensor, captions: torch.Tensor, controls: torch.Tensor | None,
                 drawings: Drawings):
        self.device, self.latents, self.captions = latents.device, latents, captions.to(latents.device)
        self.controls = controls if controls is None else controls.to(self.device)
        self.training = torch.from_numpy(drawings.training).to(self.device)
        text_rows = {text: row for row, text in enumerate(drawings.texts)}
        self.text_rows = torch.tensor([text_rows[text] for text in (*drawings.captions, "")], device=self.device)

    def batch(self, generator: torch.Generator, dropped: float, swapped: float, size: int) -> tuple:
        """(x0, caption, control image or None, noise, noise level) of `size` samples; levels spread evenly in [0, 1].

        Args:
            dropped, swapped: shares of the captions that are replaced by the empty one, and by another drawing's.
        """
        drawn = {"generator": generator, "device": self.device}
        rows = self.training[torch.randint(len(self.training), (size,), **drawn)]
        columns = torch.randint(self.latents.shape[1], (size,), **drawn)
        others = self.training[torch.randint(len(self.training), (size,), **drawn)]
        chance = torch.rand(size, **drawn)

        captioned = torch.where(chance < swapped, others, rows)
        captioned = self.text_rows[torch.where(chance >= 1 - dropped, len(self.text_rows) - 1, captioned)]

        noise = torch.randn(size, *self.latents.shape[2:], **drawn)
        spread = (torch.randperm(size, **drawn) + torch.rand(size, **drawn)) / size
        images = None
        if self.controls is not None:
            images = as_image(self.controls[rows, columns])
        return self.latents[rows, columns], self.captions[captioned], images, noise, spread


def as_image(control: torch.Tensor) -> torch.Tensor:
    """(N, H, W) bool to a control image (N, 3, H, W) in [0, 1]."""
    return control.float()[:, None].expand(-1, 3, -1, -1)


class Varied:
    """Each drawing in its variations, made when they are asked for; always the same ones.

    Args:
        variations: how many of each drawing are (upright, mirrored), in this order.
        device: makes and has them.
    """

    def __init__(self, drawings: Drawings, variations: tuple[int, int], device: torch.device | str = "cpu"):
        self.pictures, self.device = torch.from_numpy(drawings.pictures), torch.device(device)
        generator, count = torch.Generator().manual_seed(0), len(drawings.captions)
        self.maps = torch.cat([draw_variations(count * each, generator, mirrored).unflatten(0, (count, each))
                               for each, mirrored in zip(variations, (0.0, 1.0), strict=True)], 1)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, row: int) -> torch.Tensor:
        """The variations (K, 3, size, size) of a drawing."""
        return self.of([row])[0]

    def of(self, rows: Sequence[int]) -> torch.Tensor:
        """Those of some drawings (N, K, 3, size, size)."""
        maps = self.maps[rows].to(self.device)
        images = to_images(self.pictures[rows].to(self.device)).repeat_interleave(maps.shape[1], 0)
        return vary(images, maps.flatten(0, 1)).unflatten(0, maps.shape[:2])

    def some(self, rows: Sequence[int]) -> Iterator[torch.Tensor]:
        """``of`` all these drawings in turn, as many at once as the device can make use of."""
        at_once = 1 if self.device.type == "cpu" else AT_ONCE
        for first in range(0, len(rows), at_once):
            yield self.of(rows[first:first + at_once])


def encode(varied: Varied, encoder: nn.Module) -> torch.Tensor:
    """The latents (N, K, C, h, w) of varied drawings, as the encoder on their device makes them."""
    with torch.no_grad():
        return torch.cat([encoder(some.flatten(0, 1)).unflatten(0, some.shape[:2])
                          for some in varied.some(range(len(varied)))])


def control_maps(varied: Varied, control: Callable[[np.ndarray], np.ndarray]) -> torch.Tensor:
    """The maps (N, K, H, W) bool that `control` makes of varied drawings, each (H, W, 3) uint8."""
    def maps_of(batch: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.stack([control(drawing) for drawing in to_drawings(batch)]))

    return torch.stack([maps_of(varied[row]) for row in range(len(varied))])


def load_texts(drawings: Drawings, folder: Path, base: Base) -> tuple[torch.Tensor, torch.Tensor]:
    """The drawings' encoded ``texts``: (N, 77, 768), and pooled (N, 768).

    They are kept in `folder`, for they take minutes.
    """
    file = folder / f"{base.name}_texts.pt"
    if not file.exists():
        torch.save(encode_texts(drawings.texts, base), file)
    return torch.load(file, weights_only=True)
