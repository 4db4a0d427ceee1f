"""How well the demonstration's pictures follow their control, sampled in ComfyUI with its own nodes.

``run(node, **inputs)`` executes a node and returns its output, or all of them where it has several.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from demo_model import provide
from demo_model.agreement import drawn_region, edge_f1, iou
from demo_model.bases import BASES

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

BATCH = 16


class Demonstration:
    """The trained model in ComfyUI, drawing for the given captions.

    Args:
        drawings: (N, size, size, 3) uint8 RGB, which the control images are made of.
        captions: N prompts.
        cfg: scale of guidance, 1 for none.
        base: a key of ``BASES``.
        steps: the sampler's, None for the base's own.
    """

    def __init__(self, run: Callable, drawings: np.ndarray, captions: list[str], cfg: float = 1.0,
                 base: str = "sd15", steps: int | None = None):
        self.run, self.cfg, self.base = run, cfg, BASES[base]
        self.sampler = self.base.sampler | ({"steps": steps} if steps else {})
        self.model, self.clip, self.vae = run("CheckpointLoaderSimple", ckpt_name=self.base.checkpoint)
        self.prompts = [run("CLIPTextEncode", clip=self.clip, text=caption) for caption in ("", *captions)]
        self.images = torch.from_numpy(drawings).float() / 255

    def edges(self, pictures: torch.Tensor) -> np.ndarray:
        """The edges (N, H, W) bool that ControlNeXt Canny finds in an IMAGE."""
        found = self.run("ControlNeXtCanny", image=pictures, threshold="auto", low_threshold=100, high_threshold=200)
        return found[..., 0].numpy() > 0.5

    def regions(self, pictures: torch.Tensor) -> np.ndarray:
        """The regions (N, H, W) bool in which an IMAGE is drawn on."""
        return np.stack([drawn_region(picture) for picture in (pictures * 255).round().byte().numpy()])

    def smaller(self, pictures: torch.Tensor) -> torch.Tensor:
        """An IMAGE at a quarter of its size."""
        return self.run("ImageScaleBy", image=pictures, upscale_method="area", scale_by=0.25)

    def larger(self, pictures: torch.Tensor) -> torch.Tensor:
        """An IMAGE at four times its size, by bicubic interpolation."""
        return self.run("ImageScaleBy", image=pictures, upscale_method="bicubic", scale_by=4.0).clamp(0, 1)

    def controlled(self, kind: str, controls: np.ndarray | torch.Tensor, strength: float,
                   model: ModelPatcher | None = None) -> ModelPatcher:
        """A MODEL under control, a picture of the batch for each of (N, H, W) bool or of an IMAGE."""
        file, unet_file = (f"{self.base.prefix}{kind}_{part}.safetensors" for part in ("controlnet", "unet"))
        model = self.run("ControlNeXtUNetLoader", model=model or self.model, mode="auto", strength=1.0,
                         unet_name=unet_file)
        controlnext = self.run("ControlNeXtLoader", controlnext_name=file, variant="auto")
        image = torch.as_tensor(controls).float()
        if image.ndim == 3:
            image = image[..., None].expand(-1, -1, -1, 3)
        return self.run("ControlNeXtApply", model=model, controlnext=controlnext, image=image, strength=strength,
                        start_percent=0.0, end_percent=1.0)

    def styled(self):
        """The MODEL with the style LoRA."""
        return self.run("LoraLoader", model=self.model, clip=self.clip, lora_name=provide.LORA, strength_model=1.0,
                        strength_clip=0.0)[0]

    def draw(self, seed: int, kind: str = "", controls: np.ndarray | torch.Tensor | None = None,
             strength: float = 1.0, model: ModelPatcher | None = None, start: torch.Tensor | None = None,
             denoise: float = 1.0) -> torch.Tensor:
        """An IMAGE of N pictures by the captions, without control where there are no `controls`.

        Args:
            start: an IMAGE of N pictures to begin at, under as much noise as `denoise` says; without it, only noise.
        """
        pictures = []
        for first in range(0, len(self.images), BATCH):
            rows = slice(first, first + BATCH)
            controlled = model or self.model
            if controls is not None:
                controlled = self.controlled(kind, controls[rows], strength, model)

            contexts, extras = zip(*(prompt[0] for prompt in self.prompts[1:][rows]), strict=True)
            positive = [torch.cat(contexts), {"pooled_output": torch.cat([e["pooled_output"] for e in extras])}]

            height, width = self.images.shape[1:3]
            latent = (self.run("EmptyLatentImage", width=width, height=height, batch_size=len(contexts))
                      if start is None else self.run("VAEEncode", pixels=start[rows], vae=self.vae))
            latent = self.run("KSampler", model=controlled, positive=[positive], negative=self.prompts[0],
                              latent_image=latent, seed=seed * 1000 + first, cfg=self.cfg,
                              denoise=denoise, **self.sampler)
            pictures.append(self.run("VAEDecode", samples=latent, vae=self.vae))
        return torch.cat(pictures)

    def ceiling(self) -> torch.Tensor:
        """The VAE's own IMAGE of the drawings, encoded and decoded."""
        latent = self.run("VAEEncode", pixels=self.images, vae=self.vae)
        return self.run("VAEDecode", samples=latent, vae=self.vae)


def agreements(found: np.ndarray, controls: np.ndarray, kind: str) -> float:
    """Mean agreement of what pictures show with what they should, both (N, H, W) bool: IoU for mask, else edges' F1."""
    measure = iou if kind == "mask" else edge_f1
    return float(np.mean([measure(*pair) for pair in zip(found, controls, strict=True)]))


def psnr(pictures: torch.Tensor, originals: torch.Tensor) -> float:
    """Mean peak signal-to-noise ratio of an IMAGE to another in dB, picture by picture."""
    return float((-10 * (pictures - originals).square().flatten(1).mean(1).log10()).mean())
