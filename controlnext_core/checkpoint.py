"""From a file's state dict to a ControlNeXt module, or one sentence on what the file is instead."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .bases import BASES, bases_of
from .families import families_of
from .layouts import layout_of, solve_widths
from .module import ControlNeXtModule, Operations
from .sentences import either, quoted

PREFIXES = ("module.", "controlnet.", "controlnext.", "model.")
CONTROL = ("controlnext.", "controlnet.")  # of the control in a file that holds the UNet, too
ANCHORS = ("down_res.0.", "mid_convs.", "down_sample.0.")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
ANOTHER = "download the file again or choose another"

# (what the file is, any of these in a key); the first that fits speaks
FOREIGN = (
    ("a LoRA", ("lora_", ".lora", "lora.", "hada_", "lokr_", ".diff_b", ".dora_scale")),
    ("a full checkpoint", ("cond_stage_model.", "conditioner.embedders.")),
    ("a full ControlNet", ("control_model.", "controlnet_cond_embedding", "controlnet_down_blocks", "zero_convs.",
                           "input_hint_block", "controlnet_x_embedder", "controlnet_blocks")),
    ("a T2I-Adapter", ("adapter.body.", "body.0.resnets", "body.0.block1")),
    ("a VAE", ("encoder.conv_in", "decoder.conv_in", "first_stage_model.", "quant_conv", "decoder.up.",
               "encoder.down.")),
    ("UNet weights", ("down_blocks.", "up_blocks.", "mid_block.", "input_blocks.", "output_blocks.", "middle_block.",
                      "diffusion_model.", "double_blocks.", "single_blocks.", "joint_blocks.", "transformer_blocks.")),
    ("a text or image encoder", ("text_model.", "vision_model.", "transformer.resblocks", "encoder.block.")),
)


@dataclass(frozen=True)
class Checkpoint:
    """A ControlNeXt file that fits.

    Attributes:
        module: made for the file's weights; ``load_weights`` fills it.
        state_dict: the file's weights, without prefixes and scale.
        layout: the name that ``layouts.layout_of`` gives it.
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
            raise ValueError(f"variant: {quoted(variant)} was chosen, but the file's tensors are those of {fitting}; "
                             f"choose auto or {fitting}.")


def named_tensors(state_dict: Mapping) -> dict[str, torch.Tensor]:
    """The tensors of a file that have names."""
    return {key: value for key, value in state_dict.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}


def strip_prefixes(state_dict: dict) -> dict:
    """The state dict with ``module.``, ``controlnet.`` and the like taken off when every key has them."""
    for prefix in PREFIXES * 2:
        if state_dict and all(key.startswith(prefix) for key in state_dict):
            state_dict = {key[len(prefix):]: value for key, value in state_dict.items()}
    return state_dict


def is_control(keys: Iterable[str]) -> bool:
    """Whether these are the keys of a ControlNeXt module."""
    keys = list(keys)

    def begins_a_key(anchor: str) -> bool:
        return any(key.startswith(anchor) for key in keys)

    return all(map(begins_a_key, ANCHORS))


def _control_part(state_dict: dict) -> dict:
    """The control of a file that holds the UNet, too, as DeepSpeed saves both in one; other files as they are."""
    for prefix in CONTROL:
        part = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        if is_control(part):
            return part
    return state_dict


def kind_of_file(keys: Iterable[str]) -> str:
    """The kind of a file that is not a ControlNeXt module, told from its keys, as a sentence names it."""
    keys = list(keys)
    for what, marks in FOREIGN:
        if any(mark in key for key in keys for mark in marks):
            return what
    return f"of an unknown kind (its first tensor is {quoted(keys[0])})"


def _other_kind(keys: Iterable[str]) -> str:
    """The kind of a file, as somebody who looks for a ControlNeXt module wants to hear it."""
    what = kind_of_file(keys)
    if what != "UNet weights":
        return what
    bases = bases_of(keys)
    made_for = f" for {either(BASES[base].title for base in bases)}" if bases else ""
    return f"{what}{made_for}, which Load ControlNeXt UNet Weights takes"


def check_floats(tensors: Iterable[tuple[str, torch.Tensor]], name: str) -> None:
    """ValueError: one of the (key, tensor) is not of floating point numbers, or not all of them are there; names it."""
    for key, value in tensors:
        if value.dtype not in FLOATS:
            dtype = str(value.dtype).removeprefix("torch.")
            raise ValueError(f"{name}: tensor {quoted(key)} holds {dtype} numbers where floating point weights are "
                             f"expected; {ANOTHER}.")
        if not is_whole(value):
            raise ValueError(f"{name}: tensor {quoted(key)} does not hold all of its numbers (it is sparse, nested, "
                             f"repeated or a mere shape) where plain weights are expected; {ANOTHER}.")


def is_whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor that came from a file holds a number for each of its places."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        return False
    return tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], name: str) -> None:
    """ValueError: one of the (key, tensor), none of which is empty, holds NaN or infinite numbers; names it."""
    for key, value in tensors:
        # the smallest and the largest are NaN when any is, and need no memory; PyTorch has none of 8-bit floats
        extremes = torch.stack(torch.aminmax(value.float() if value.itemsize == 1 else value))
        if not extremes.isfinite().all():
            raise ValueError(f"{name}: tensor {quoted(key)} holds NaN or infinite weights; {ANOTHER}.")


def open_checkpoint(state_dict: Mapping, name: str, operations: Operations = nn,
                    device: torch.device | None = None) -> Checkpoint:
    """Check a file's state dict and make the module that it is for; ``Checkpoint.load_weights`` fills it.

    Args:
        state_dict: {key: tensor} as it came from the file, prefixes, the UNet beside it and all.
        name: the file's name, for messages.
        operations: where layers come from.
        device: the module's, whose parameters take the dtype of the file.

    Raises:
        ValueError: not a ControlNeXt module (says what it is), a missing, foreign or wrongly shaped tensor (named),
            weights that are no plain floating point numbers or not finite (named).
    """
    name = quoted(name)
    state_dict = strip_prefixes(named_tensors(state_dict))
    if not state_dict:
        raise ValueError(f"{name} holds no tensors with names; download it again or choose another file.")

    state_dict = _control_part(state_dict)
    if not is_control(state_dict):
        raise ValueError(f"{name} is not a ControlNeXt model: it is {_other_kind(state_dict)}; choose the small "
                         f"ControlNeXt file (often called controlnet.safetensors, 7 to 22 MB).")

    check_floats(state_dict.items(), name)
    dtype = next(value.dtype for key, value in state_dict.items() if key != "scale")
    try:
        widths = solve_widths({key: tuple(value.shape) for key, value in state_dict.items()})
        module = ControlNeXtModule(widths, list(state_dict), operations=operations, dtype=dtype, device=device)
    except ValueError as error:
        raise ValueError(f"{name} does not fit any ControlNeXt model: {error}; {ANOTHER}.") from None
    check_finite(state_dict.items(), name)

    scale = float(state_dict.pop("scale", torch.ones(())))
    return Checkpoint(module.eval().requires_grad_(False), state_dict, layout_of(list(state_dict)), scale)
