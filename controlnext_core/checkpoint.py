"""From a file's state dict to a ControlNeXt module, or one sentence on what the file is instead."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from .families import either, families_of
from .layouts import layout_of, solve_widths
from .module import ControlNeXtModule

PREFIXES = ("module.", "controlnet.", "controlnext.", "model.")
ANCHORS = ("down_res.0.", "mid_convs.", "down_sample.0.")

# (what the file is, any of these in a key); the first that fits speaks
FOREIGN = (
    ("a LoRA", ("lora_", ".lora", "lora.", "hada_", "lokr_", ".diff_b", ".dora_scale")),
    ("a full checkpoint", ("cond_stage_model.", "conditioner.embedders.")),
    ("a full ControlNet", ("control_model.", "controlnet_cond_embedding", "controlnet_down_blocks", "zero_convs.",
                           "input_hint_block", "controlnet_x_embedder", "controlnet_blocks")),
    ("a T2I-Adapter", ("adapter.body.", "body.0.resnets", "body.0.block1")),
    ("a VAE", ("encoder.conv_in", "decoder.conv_in", "first_stage_model.", "quant_conv", "decoder.up.",
               "encoder.down.")),
    ("UNet weights (Load ControlNeXt UNet Weights takes these)",
     ("down_blocks.", "up_blocks.", "mid_block.", "input_blocks.", "output_blocks.", "middle_block.",
      "diffusion_model.")),
    ("a transformer diffusion model", ("double_blocks.", "single_blocks.", "joint_blocks.", "transformer_blocks.")),
    ("a text or image encoder", ("text_model.", "vision_model.", "transformer.resblocks", "encoder.block.")),
)


@dataclass(frozen=True)
class Checkpoint:
    """A ControlNeXt file that fits.

    Attributes:
        module: made for the file's weights; ``load_weights`` fills it.
        state_dict: the file's weights, without prefixes and scale.
        layout: of ``layouts.layout_of``.
        scale: the learned scale, 1.0 when the file has none.
    """

    module: ControlNeXtModule
    state_dict: dict[str, torch.Tensor]
    layout: str
    scale: float

    def load_weights(self, assign: bool = False) -> ControlNeXtModule:
        """Fill the module, with the file's own tensors if ``assign``, else with copies; returns the module."""
        self.module.load_state_dict(self.state_dict, assign=assign)
        return self.module

    def known_family(self, declared: str | None) -> str:
        """The family that a file declares in its metadata, ``auto`` when it declares none of its layout."""
        return declared if declared in [family.name for family in families_of(self.layout)] else "auto"

    def check_variant(self, variant: str) -> None:
        """Raises ValueError when a named variant cannot be what this file is."""
        names = [family.name for family in families_of(self.layout)]
        if variant != "auto" and variant not in names:
            fitting = either(names)
            raise ValueError(f"variant: {variant} was chosen, but the file's tensors are those of {fitting}; "
                             f"choose auto or {fitting}.")


def strip_prefixes(state_dict: dict) -> dict:
    """The state dict with ``module.``, ``controlnet.`` and the like taken off when every key has them."""
    for prefix in PREFIXES * 2:
        if state_dict and all(key.startswith(prefix) for key in state_dict):
            state_dict = {key[len(prefix):]: value for key, value in state_dict.items()}
    return state_dict


def kind_of_file(keys: Iterable[str]) -> str:
    """What a file that is not a ControlNeXt module looks like, from its keys."""
    for what, marks in FOREIGN:
        if any(mark in key for key in keys for mark in marks):
            return what
    return f"of an unknown kind (its first tensor is {next(iter(keys))})"


def open_checkpoint(state_dict: dict, name: str, operations=nn, device=None) -> Checkpoint:
    """Check a file's state dict and make the module that it is for; ``Checkpoint.load_weights`` fills it.

    Args:
        state_dict: {key: tensor} as it came from the file, prefixes and all.
        name: the file's name, for messages.
        operations: where layers come from.
        device: of the module's (yet unfilled) parameters, which take the dtype of the file.

    Raises:
        ValueError: not a ControlNeXt module (says what it is), a missing, foreign or wrongly shaped tensor (named),
            integer or non-finite weights (named).
    """
    state_dict = strip_prefixes({key: value for key, value in state_dict.items() if isinstance(value, torch.Tensor)})
    if not state_dict:
        raise ValueError(f"{name} holds no tensors; download it again or choose another file.")
    if not all(any(key.startswith(anchor) for key in state_dict) for anchor in ANCHORS):
        raise ValueError(f"{name} is not a ControlNeXt model: it is {kind_of_file(state_dict)}; choose the small "
                         f"ControlNeXt file (often called controlnet.safetensors, 7 to 22 MB).")
    for key, value in state_dict.items():
        if not value.is_floating_point():
            dtype = str(value.dtype).removeprefix("torch.")
            raise ValueError(f"{name}: tensor {key} holds {dtype} numbers where floating point weights are expected; "
                             f"download the file again or choose another.")
    try:
        widths = solve_widths({key: tuple(value.shape) for key, value in state_dict.items()})
    except ValueError as error:
        raise ValueError(f"{name} does not fit any ControlNeXt model: {error}; download the file again or choose "
                         f"another.") from None
    for key, value in state_dict.items():
        if not torch.isfinite(value.float()).all():
            raise ValueError(f"{name}: tensor {key} holds NaN or infinite weights; download the file again or choose "
                             f"another.")
    scale = float(state_dict.pop("scale", torch.ones(())))
    dtype = next(iter(state_dict.values())).dtype
    module = ControlNeXtModule(widths, list(state_dict), operations=operations, dtype=dtype, device=device)
    return Checkpoint(module.eval().requires_grad_(False), state_dict, layout_of(list(state_dict)), scale)
