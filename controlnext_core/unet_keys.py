"""Diffusers names to ComfyUI's, for the UNets of SD1.5, SDXL and SVD (LDM names); transformers have their own tables.

Inside a layer the names differ by a table; which layer it is follows from where the model's own down- and upsamplers
stand, so any number of levels and blocks works.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .transformer_keys import transformer_names

# LDM name -> diffusers name, up to the final .weight or .bias
TOP = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out", "out.2": "conv_out",
}
RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
TIME_POSITION = {"time_pos_embed.0": "time_pos_embed.linear_1", "time_pos_embed.2": "time_pos_embed.linear_2"}


@dataclass(frozen=True)
class Target:
    """The place of a diffusers tensor in ComfyUI's model.

    Attributes:
        key: ComfyUI's tensor.
        rows: (first, how many) of it along its first dimension, for one of several in one tensor; None is all of it.
        exchanged: its halves along the first dimension stand the other way round.
    """

    key: str
    rows: tuple[int, int] | None = None
    exchanged: bool = False

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The shape of the diffusers tensor, from that of ComfyUI's."""
        return tuple(whole) if self.rows is None else (self.rows[1], *whole[1:])

    def ordered(self, value: torch.Tensor) -> torch.Tensor:
        """The diffusers tensor with its halves as ComfyUI has them."""
        return torch.cat(value.chunk(2)[::-1]) if self.exchanged else value

    def spread(self, value: torch.Tensor, whole: int) -> torch.Tensor:
        """The diffusers tensor with zeros around it, as ComfyUI's of ``whole`` rows; differentiable."""
        value = self.ordered(value)
        if self.rows is None:
            return value

        first, rows = self.rows
        return F.pad(value, (0, 0) * (value.ndim - 1) + (first, whole - first - rows))


def targets_of(shapes: Mapping[str, tuple]) -> dict[str, Target]:
    """{diffusers key: Target} of a UNet or a transformer with tensors of these keys and shapes in ComfyUI.

    Args:
        shapes: {key without ``diffusion_model.``: shape}.
    """
    targets = {name: Target(key, rows, exchanged) for name, key, rows, exchanged in transformer_names(shapes)}
    return targets or {name: Target(key) for name, key in diffusers_to_ldm(shapes).items()}


def diffusers_to_ldm(ldm_keys: Iterable[str]) -> dict[str, str]:
    """{diffusers key: LDM key} of one UNet; keys that diffusers UNets lack (another model's head) are left out.

    Args:
        ldm_keys: the keys of ComfyUI's ``UNetModel`` state dict, without ``diffusion_model.``.
    """
    keys = list(ldm_keys)
    downsamplers = _blocks(keys, r"input_blocks\.(\d+)\.0\.op\.weight")
    upsamplers = _blocks(keys, r"output_blocks\.(\d+)\.\d\.conv\.weight")
    video = {key.split(".time_stack.")[0] for key in keys if ".time_stack." in key}

    names = {}
    for key in keys:
        path, _, tensor = key.rpartition(".")
        name = TOP.get(path) or _layer(path, downsamplers, upsamplers, video)
        if name:
            names[f"{name}.{tensor}"] = key
    return names


def _blocks(keys: list[str], pattern: str) -> list[int]:
    return sorted(int(match[1]) for key in keys if (match := re.fullmatch(pattern, key)))


def _layer(path: str, downsamplers: list[int], upsamplers: list[int], video: set[str]) -> str | None:
    """Diffusers name of the layer at an LDM path inside a block, None for anything else."""
    if match := re.fullmatch(r"input_blocks\.(\d+)\.(\d)\.(.+)", path):
        block, layer, rest = int(match[1]), int(match[2]), match[3]
        level = bisect_left(downsamplers, block)
        # block 0 is conv_in; a level starts after the downsampler of the one before
        index = block - 1 - (downsamplers[level - 1] if level else 0)
        prefix = f"down_blocks.{level}"
        if rest == "op":
            return f"{prefix}.downsamplers.0.conv"
    elif match := re.fullmatch(r"output_blocks\.(\d+)\.(\d)\.(.+)", path):
        block, layer, rest = int(match[1]), int(match[2]), match[3]
        level = bisect_left(upsamplers, block)
        # an upsampler shares its block with the last resnet of its level
        index = block - (upsamplers[level - 1] + 1 if level else 0)
        prefix = f"up_blocks.{level}"
        if rest == "conv":
            return f"{prefix}.upsamplers.0.conv"
    elif match := re.fullmatch(r"middle_block\.(\d)\.(.+)", path):
        layer, rest = int(match[1]), match[2]
        index, layer = divmod(layer, 2)
        prefix = "mid_block"
    else:
        return None

    if layer == 1:
        rest = TIME_POSITION.get(rest) or re.sub(r"^time_stack\.", "temporal_transformer_blocks.", rest)
        return f"{prefix}.attentions.{index}.{rest}"
    if rest == "time_mixer":
        return f"{prefix}.resnets.{index}.time_mixer"

    kind = ""
    if rest.startswith("time_stack."):
        kind, rest = "temporal_res_block.", rest.removeprefix("time_stack.")
    elif path.removesuffix(f".{rest}") in video:
        kind = "spatial_res_block."
    return f"{prefix}.resnets.{index}.{kind}{RESNET[rest]}" if rest in RESNET else None
