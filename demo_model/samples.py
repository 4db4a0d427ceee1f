"""What the denoiser is trained on: latents of varied drawings, with their captions and control images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from demo_model.text import captions_to_contexts
from demo_model.world import World, draw_variations, to_drawings, to_images, vary

BATCH = 16
VARIATIONS = 8  # of each drawing
TIMESTEPS = 1000


class Samples:
    """Batches of what training may see.

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
            images = as_image(self.controls[rows, columns])
        return (self.latents[rows, columns], self.captions[captioned].float(), images, noise,
                (spread * TIMESTEPS).long().clamp(max=TIMESTEPS - 1))


def as_image(control: torch.Tensor) -> torch.Tensor:
    """(N, H, W) bool to a control image (N, 3, H, W) in [0, 1]."""
    return control.float()[:, None].expand(-1, 3, -1, -1)


def prepare(world: World, folder: Path, encoder: nn.Module, device: torch.device,
            control: Callable[[np.ndarray], np.ndarray] | None = None) -> tuple[Samples, float]:
    """Encode the world's drawings in VARIATIONS each, and their captions, which are kept in `folder`.

    Args:
        control: from a drawing (H, W, 3) uint8 to its control (H, W) bool.

    Returns:
        The samples, and the deviation of the encoder's latents, by which theirs are divided.
    """
    maps = draw_variations(len(world.captions) * VARIATIONS, torch.Generator().manual_seed(0))
    varied = [vary(image.expand(VARIATIONS, -1, -1, -1), maps)
              for image, maps in zip(to_images(world.drawings), maps.split(VARIATIONS), strict=True)]
    with torch.no_grad():
        latents = torch.stack([encoder(batch.to(device)).cpu() for batch in varied])
    if not (folder / "contexts.pt").exists():
        torch.save(captions_to_contexts([*world.captions, ""]), folder / "contexts.pt")
    contexts = torch.load(folder / "contexts.pt", weights_only=True)
    controls = control and torch.stack([
        torch.from_numpy(np.stack([control(drawing) for drawing in to_drawings(batch)])) for batch in varied])
    deviation = latents.std().item()
    return Samples(latents / deviation, contexts, controls, world), deviation
