"""Diffusers names to ComfyUI's, for the UNets of SD1.5, SDXL and SVD (LDM names) and for SD3's MMDiT.

Inside a layer the names differ by a table; which layer it is follows from where the model's own down- and upsamplers
stand, so any number of levels and blocks works. An MMDiT has one list of blocks.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

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

# ComfyUI's MMDiT name -> diffusers name, up to the final .weight or .bias
MMDIT_TOP = {
    "context_embedder": "context_embedder", "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear", "final_layer.linear": "proj_out",
}
MMDIT_BLOCK = {
    "x_block": {
        "adaLN_modulation.1": ("norm1.linear",), "mlp.fc1": ("ff.net.0.proj",), "mlp.fc2": ("ff.net.2",),
        **{f"{attention}.{ours}": tuple(f"{attention}.{name}" for name in theirs) for attention in ("attn", "attn2")
           for ours, theirs in (("qkv", ("to_q", "to_k", "to_v")), ("proj", ("to_out.0",)), ("ln_q", ("norm_q",)),
                                ("ln_k", ("norm_k",)))},
    },
    "context_block": {
        "adaLN_modulation.1": ("norm1_context.linear",), "mlp.fc1": ("ff_context.net.0.proj",),
        "mlp.fc2": ("ff_context.net.2",), "attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "attn.proj": ("attn.to_add_out",), "attn.ln_q": ("attn.norm_added_q",), "attn.ln_k": ("attn.norm_added_k",),
    },
}


@dataclass(frozen=True)
class Target:
    """Where a diffusers tensor lies in ComfyUI's model.

    Attributes:
        key: ComfyUI's tensor.
        third: which third of it along its first dimension, for q, k and v in one tensor; None is all of it.
        exchanged: its halves along the first dimension stand the other way round.
    """

    key: str
    third: int | None = None
    exchanged: bool = False

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """Of the diffusers tensor, from that of ComfyUI's."""
        return tuple(whole) if self.third is None else (whole[0] // 3, *whole[1:])

    def ordered(self, value: torch.Tensor) -> torch.Tensor:
        """The diffusers tensor with its halves as ComfyUI has them."""
        return torch.cat(value.chunk(2)[::-1]) if self.exchanged else value

    def spread(self, value: torch.Tensor) -> torch.Tensor:
        """The diffusers tensor in the shape of ComfyUI's, with zeros around it; differentiable."""
        value = self.ordered(value)
        if self.third is None:
            return value
        return torch.cat([value if third == self.third else torch.zeros_like(value) for third in range(3)])


def targets_of(keys: Iterable[str]) -> dict[str, Target]:
    """{diffusers key: Target} of a UNet or an MMDiT with these keys of ComfyUI's, without ``diffusion_model.``."""
    keys = list(keys)
    if any(key.startswith("joint_blocks.") for key in keys):
        return _mmdit_targets(keys)
    return {name: Target(key) for name, key in diffusers_to_ldm(keys).items()}


def _mmdit_targets(keys: list[str]) -> dict[str, Target]:
    targets = {"pos_embed.pos_embed": Target("pos_embed")} if "pos_embed" in keys else {}
    for key in keys:
        path, _, tensor = key.rpartition(".")
        if path in MMDIT_TOP:
            # diffusers has the scale before the shift where no gate follows
            targets[f"{MMDIT_TOP[path]}.{tensor}"] = Target(key, exchanged=path.endswith("adaLN_modulation.1"))
        elif match := re.fullmatch(r"joint_blocks\.(\d+)\.(x_block|context_block)\.(.+)", path):
            block, stream, layer = match.groups()
            names = MMDIT_BLOCK[stream].get(layer, ())
            # the last block's text goes nowhere, so it has no more than a scale and a shift
            last = stream == "context_block" and f"joint_blocks.{block}.{stream}.mlp.fc1.{tensor}" not in keys
            for third, name in enumerate(names):
                targets[f"transformer_blocks.{block}.{name}.{tensor}"] = Target(
                    key, third if len(names) == 3 else None, last and layer == "adaLN_modulation.1")
    return targets


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
