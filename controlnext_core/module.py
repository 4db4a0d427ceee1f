"""The ControlNeXt module: a small convolutional net from a control image and a timestep to features.

One class covers the released families; widths come from the state dict. Its forward is split where the timestep
enters: ``image_part`` depends on the image only, ``timestep_part`` on both. A module without time, as transformers have
it, gives the same features at every timestep.
"""

import math
from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn

from .cross_normalization import pool
from .families import Family
from .layouts import TIME_WIDTHS, WIDTHS, WITHOUT_TIME

STEM_GROUPS = 2  # cannot be deduced from the state dict, nor can the other group numbers
CHANNELS_PER_GROUP = 32
Operations = ModuleType | type  # where layers come from: ``torch.nn`` or one of ComfyUI's ``comfy.ops`` classes


def timestep_embedding(timestep: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoidal embedding (N,) -> (N, dim) in float32: [cos, sin] of t * 10000^(-i / (dim/2)), no frequency shift."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half)
    angles = timestep.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Linear, SiLU, Linear: (N, frequencies) -> (N, time)."""

    def __init__(self, frequencies: int, time: int, operations: Operations, **factory):
        super().__init__()
        self.linear_1 = operations.Linear(frequencies, time, **factory)
        self.linear_2 = operations.Linear(time, time, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, conv; + time; GroupNorm, SiLU, conv; + shortcut. Split before the timestep enters.

    Args:
        time: width of the timestep's embedding, None where it does not enter.
    """

    def __init__(self, in_channels: int, out_channels: int, time: int | None, shortcut: bool, operations: Operations,
                 **factory):
        super().__init__()
        groups = math.gcd(in_channels, max(out_channels // CHANNELS_PER_GROUP, 1))  # 1 for an RGB input
        self.norm1 = operations.GroupNorm(groups, in_channels, eps=1e-6, **factory)
        self.conv1 = operations.Conv2d(in_channels, out_channels, 3, padding=1, **factory)
        self.time_emb_proj = operations.Linear(time, out_channels, **factory) if time else None
        self.norm2 = operations.GroupNorm(groups, out_channels, eps=1e-6, **factory)
        self.conv2 = operations.Conv2d(out_channels, out_channels, 3, padding=1, **factory)
        self.conv_shortcut = operations.Conv2d(in_channels, out_channels, 1, **factory) if shortcut else nn.Identity()

    def before_time(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.conv1(F.silu(self.norm1(x))), self.conv_shortcut(x)

    def after_time(self, h: torch.Tensor, residual: torch.Tensor, emb: torch.Tensor | None) -> torch.Tensor:
        if emb is not None:
            h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        return self.conv2(F.silu(self.norm2(h))) + residual


class Downsample(nn.Module):
    """A strided convolution: (N, C, H, W) -> (N, C, H/2, W/2), rounded up."""

    def __init__(self, channels: int, operations: Operations, **factory):
        super().__init__()
        self.conv = operations.Conv2d(channels, channels, 3, stride=2, padding=1, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class ControlNeXtModule(nn.Module):
    """The module of every released family.

    Args:
        widths: named widths, from ``layouts.solve_widths``.
        keys: the state dict's keys; they tell the stem, the stages, the shortcuts and the kind of middle.
        operations: where layers come from.
        dtype, device: the parameters'; None for torch's own.
        scale: where the module learns the scale that control is multiplied by, the number that it begins as; None
            elsewhere.

    Attributes:
        scale: the parameter, or None.
        frequencies: of the timestep's embedding; None without time.
        out_channels: of the features.
    """

    def __init__(self, widths: dict[str, int], keys: Sequence[str], operations: Operations = nn,
                 dtype: torch.dtype | None = None, device: torch.device | None = None, scale: float | None = None):
        super().__init__()
        self.scale = None if scale is None else nn.Parameter(torch.tensor(scale, dtype=dtype, device=device))
        factory = {"operations": operations, "dtype": dtype, "device": device}
        layer = {"dtype": dtype, "device": device}
        stages = sum(name.startswith("width_") for name in widths) - 1
        time, last = widths.get("time"), widths[f"width_{stages}"]
        self.frequencies = widths.get("frequencies")
        self.out_channels = widths["out"]

        self.time_embedding = TimestepEmbedding(self.frequencies, time, **factory) if time else None
        self.embedding = None
        if "embedding.0.weight" in keys:
            channels = (3, widths["stem_0"], widths["stem_1"], widths["width_0"])
            layers = []
            for i, (wide_in, wide_out) in enumerate(zip(channels, channels[1:], strict=False)):
                # padding of the later two is the family's choice, made in image_part
                stride, padding = (2, 1) if i == 0 else (1, 0)
                layers += [operations.Conv2d(wide_in, wide_out, 3, stride=stride, padding=padding, **layer),
                           operations.GroupNorm(STEM_GROUPS, wide_out, **layer), nn.ReLU()]
            self.embedding = nn.Sequential(*layers)

        self.down_res = nn.ModuleList(
            ResnetBlock(widths[f"width_{i}"], widths[f"width_{i + 1}"], time,
                        f"down_res.{i}.conv_shortcut.weight" in keys, **factory)
            for i in range(stages)
        )
        self.down_sample = nn.ModuleList(Downsample(widths[f"width_{i + 1}"], **factory) for i in range(stages))

        def conv() -> nn.Module:
            return operations.Conv2d(last, last, 3, padding=1, **layer)

        def norm() -> nn.Module:
            return operations.GroupNorm(max(last // CHANNELS_PER_GROUP, 1), last, **layer)

        self.mid_residual = self.embedding is not None
        middle = [conv(), nn.ReLU(), norm(), conv(), norm()] if self.mid_residual else [conv(), nn.ReLU(), conv()]
        self.mid_convs = nn.ModuleList([nn.Sequential(*middle),
                                        operations.Conv2d(last, self.out_channels, 1, **layer)])

    @property
    def timed(self) -> bool:
        """Whether features depend on the timestep."""
        return self.time_embedding is not None

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return self.mid_convs[1].weight.dtype

    def peak(self, pixels: int, stem_pool: bool) -> int:
        """How many numbers are alive at most, to 20 %, while one image of so many pixels becomes features."""
        return (2 if stem_pool else 5) * self._widest(pixels)  # pooled, the stem itself takes most

    def image_part_numbers(self, pixels: int, stem_pool: bool) -> int:
        """How many numbers at most ``image_part`` gives for an image of so many pixels."""
        return 2 * self._widest(pixels) // (4 if stem_pool else 1)

    def _widest(self, pixels: int) -> int:
        """How many numbers the first resnet block has at once in a tensor, of a stem that does not pool."""
        return self.down_res[0].conv1.out_channels * pixels // (1 if self.embedding is None else 4)

    def image_part(self, image: torch.Tensor, stem_padding: int, stem_pool: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The part that depends on the image only: the stem and the first resnet block up to the timestep.

        Args:
            image: (N, 3, H, W) in [0, 1], RGB, in the compute dtype.
            stem_padding: padding of the stem's second and third convolution (the family's).
            stem_pool: 2x2 max pooling after the stem (the family's).

        Returns:
            (h, residual), the two tensors that ``timestep_part`` goes on from.
        """
        x = image
        if self.embedding is not None:
            for i, layer in enumerate(self.embedding):
                if stem_padding and i in (3, 6):
                    x = F.pad(x, (stem_padding,) * 4)
                x = layer(x)
        if stem_pool:
            x = F.max_pool2d(x, 2)

        return self.down_res[0].before_time(x)

    def timestep_part(self, image_part: tuple[torch.Tensor, torch.Tensor], timestep: torch.Tensor,
                      size: tuple[int, int] | None = None) -> torch.Tensor:
        """Features (N, out, h, w) from ``image_part`` and the denoiser's own timestep, (N,) or (1,) for all.

        A module without time does not look at the timestep.
        With ``size`` (H, W) they are pooled to it, before the last convolution: that is 1x1, so the order makes no
        difference.
        """
        h, residual = image_part
        emb = None
        if self.timed:
            emb = self.time_embedding(timestep_embedding(timestep, self.frequencies).to(h.dtype))
        x = self.down_sample[0](self.down_res[0].after_time(h, residual, emb))
        for resnet, downsample in zip(list(self.down_res)[1:], list(self.down_sample)[1:], strict=True):
            x = downsample(resnet.after_time(*resnet.before_time(x), emb))

        middle = self.mid_convs[0](x)
        x = middle + x if self.mid_residual else middle
        return self.mid_convs[1](x if size is None else pool(x, size))

    def forward(self, image: torch.Tensor, timestep: torch.Tensor, stem_padding: int, stem_pool: bool) -> torch.Tensor:
        """Both parts at once: image (N, 3, H, W) and timestep (N,) or (1,) to features (N, out, h, w)."""
        return self.timestep_part(self.image_part(image, stem_padding, stem_pool), timestep)


def new_module(family: Family, seed: int = 0, zero_convolution: bool = False, operations: Operations = nn,
               scale: float | None = None, **widths: int) -> ControlNeXtModule:
    """A fresh module of a family in float32, initialised as the reference does: every layer as torch has it.

    Args:
        family: its layout gives the reference's widths and whether there is a stem; it says whether there is time, and
            a module without it has a narrower stem.
        seed: makes the weights; torch's own random numbers are left as they were.
        zero_convolution: start with a last convolution of zeros, for training without cross normalization.
        operations: where layers come from; they must initialise themselves, as ``torch.nn`` does.
        scale: as ``ControlNeXtModule`` takes it.
        widths: other widths than the reference's: ``out`` (the denoiser's channels at the place of injection),
            ``frequencies``, ``time``, ``stem_0``, ``stem_1``, ``width_0`` ...; above 32 they must be multiples of 32.

    Raises:
        ValueError: a width that the family's layout does not have.
    """
    reference = WIDTHS[family.layout]
    if not family.timed:
        reference = {name: width for name, width in reference.items() if name not in TIME_WIDTHS} | WITHOUT_TIME
    if unknown := widths.keys() - reference.keys():
        raise ValueError(f"{min(unknown)} is not a width of {family.name}; it has {', '.join(reference)}.")

    widths = {**reference, **widths}
    stages = sum(name.startswith("width_") for name in widths) - 1
    keys = ["embedding.0.weight"] if "stem_0" in widths else []
    keys += [f"down_res.{i}.conv_shortcut.weight" for i in range(stages)
             if widths[f"width_{i}"] != widths[f"width_{i + 1}"]]

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU too
        module = ControlNeXtModule(widths, keys, operations=operations, dtype=torch.float32, scale=scale)
    if zero_convolution:
        for parameter in module.mid_convs[1].parameters():
            nn.init.zeros_(parameter)
    return module
