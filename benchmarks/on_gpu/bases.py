"""The denoisers that are measured, at their released sizes with random weights made on the device, or small ones."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.utils
import flops
import harness
import models
import sampling
import torch
from comfy.model_patcher import ModelPatcher
from on_gpu.device import CUDA, DEVICE
from on_gpu.figures import Work

from controlnext_core.bases import BASES
from controlnext_core.families import FAMILIES
from controlnext_core.module import new_module

DEPTHS = {"SDXL": harness.DEPTHS["sdxl"],
          **{name: dict(depth=depth, num_patches=192 ** 2, pos_embed_max_size=192, **changes)
             for name, (depth, changes) in flops.SD3S.items()},
          **{one.name: one.changes for one in flops.TRANSFORMERS}}


@dataclass(frozen=True)
class Released:
    """A denoiser, and the picture or video that it draws.

    Attributes:
        title: its changes to the tests' models are in ``DEPTHS`` under it.
        dtype: that people sample it in.
        images: control images: one, or one for each frame of the video.
        text: tokens of text.
        cfg: above 1, a step has both guidance halves.
    """

    base: str
    title: str
    dtype: str
    width: int
    height: int
    images: int = 1
    text: int = 77
    cfg: float = 7.0

    @property
    def halves(self) -> int:
        return 2 if self.cfg > 1 else 1


RELEASED = {
    "sd15": Released("sd15", "SD1.5", "float16", 512, 512),
    "sdxl": Released("sdxl", "SDXL", "float16", 1024, 1024),
    "svd": Released("svd", "SVD", "float16", 1024, 576, images=14, text=1, cfg=2.5),
    "sd35": Released("sd3", "SD3.5 medium", "bfloat16", 1024, 1024, text=154, cfg=4.5),
    "flux": Released("flux", "Flux.1 dev", "bfloat16", 1024, 1024, text=512, cfg=1.0),
    "wan": Released("wan", "Wan 2.1 1.3B", "bfloat16", 832, 480, images=33, text=512, cfg=5.0),
}
SMALL_SIDE, SMALL_TEXT = 64, 8
SMALL_IMAGES = {"svd": 2, "wan": 5}


@dataclass
class Case:
    """A denoiser with its control and what a sampling or a training of it takes.

    Attributes:
        model: the MODEL without control.
        controlnext: the CONTROLNEXT, with random weights.
        latent: of zeros, as ComfyUI's empty ones.
        image: control images, (images, H, W, 3).
        conds: (positive, negative).
    """

    released: Released
    dtype: torch.dtype
    model: ModelPatcher
    controlnext: object
    latent: torch.Tensor
    image: torch.Tensor
    conds: tuple


def make(work: Work, name: str, dtype: torch.dtype | None = None) -> Case:
    """The Case of a row of ``RELEASED``.

    Args:
        dtype: of the denoiser's weights; None for that of the row, on a CPU float32.
    """
    released = RELEASED[name]
    dtype = dtype or (getattr(torch, released.dtype) if CUDA else torch.float32)
    model = small(released, dtype) if work.small else random_weights(released, dtype)
    width, height, images, text = released.width, released.height, released.images, released.text
    if work.small:
        width, height, text = SMALL_SIDE, SMALL_SIDE, min(SMALL_TEXT, text)
        images = SMALL_IMAGES.get(released.base, 1)

    generator = torch.Generator().manual_seed(2)
    latent = torch.zeros(latent_shape(released.base, width, height, images))
    image = torch.rand(images, height, width, 3, generator=generator)
    first_frame = {"concat_latent_image": torch.randn(1, 4, *latent.shape[-2:], generator=generator)}
    extra = first_frame if BASES[released.base].frames_in_rows else {}
    width_of_text = sampling.cond(model)[0][0].shape[-1]
    conds = tuple(sampling.cond(model, seed, context=torch.randn(1, text, width_of_text, generator=generator), **extra)
                  for seed in range(2))
    return Case(released, dtype, model, controlnext(work, released, model, dtype), latent, image, conds)


def latent_shape(base: str, width: int, height: int, images: int) -> tuple[int, ...]:
    """The shape of ComfyUI's latents for so many pixels and control images."""
    channels, *frames = sampling.LATENTS.get(base, (16,))
    rows = images if BASES[base].frames_in_rows else 1
    frames = [(images - 1) // 4 + 1 for _ in frames]
    return rows, channels, *frames, height // 8, width // 8


def small(released: Released, dtype: torch.dtype) -> ModelPatcher:
    """The tests' small model of a base."""
    make_one = models.small_unet if released.base in models.UNETS else models.small_transformer
    return make_one(released.base, dtype)


def random_weights(released: Released, dtype: torch.dtype) -> ModelPatcher:
    """A MODEL of the released size, of ComfyUI's class, whose weights are drawn where they are computed with."""
    make_one = models.unet_model if released.base in models.UNETS else models.transformer_model
    model = make_one(released.base, dtype, "meta", **DEPTHS.get(released.title, {}))
    fill(model.model.diffusion_model)
    model.model.device = DEVICE
    return model


def fill(network: torch.nn.Module, seed: int = 0) -> None:
    """Give a network on the meta device seeded random weights that keep the size of what goes through."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def drawn(weight: torch.Tensor) -> torch.Tensor:
        dtype = torch.bfloat16 if weight.dtype.itemsize == 1 else weight.dtype  # nothing is drawn in 8 bits
        if weight.ndim < 2:
            return torch.full(weight.shape, 0.5, device=DEVICE, dtype=dtype).to(weight.dtype)
        values = torch.randn(weight.shape, generator=generator, device=DEVICE, dtype=dtype)
        return values.mul_(weight[0].numel() ** -0.5).to(weight.dtype)

    for name, weight in list(network.named_parameters()):
        comfy.utils.set_attr_param(network, name, drawn(weight))
    for name, weight in list(network.named_buffers()):
        comfy.utils.set_attr_buffer(network, name, drawn(weight))


def controlnext(work: Work, released: Released, model: ModelPatcher, dtype: torch.dtype):
    """A CONTROLNEXT of the base's family for a MODEL, with random weights, as wide as the release unless small."""
    family = FAMILIES[released.base]
    place = work.pack.module("nodes.runtime.places").places_of(model.model.diffusion_model)[family.place_name]
    module = new_module(family, seed=1, out=place.channels, **(models.NARROW if work.small else {}))
    held = torch.float16 if dtype.itemsize < 4 else torch.float32  # as files are
    weights = {key: value.to(held) for key, value in module.state_dict().items()}
    return work.pack.module("nodes.runtime.loaded").trained_controlnext(weights, family.name, "random.safetensors", {})
