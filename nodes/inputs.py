"""Inputs that several nodes have, and the check of what comes to them over links."""

from textwrap import shorten

import numpy as np
from comfy_api.latest import io

from ..controlnext_core.sentences import quoted
from .runtime.images import RESIZES
from .runtime.places import PLACES
from .runtime.strength_over_time import CurveInput

PoseKeypoint = io.Custom("POSE_KEYPOINT")
DatasetType = io.Custom("CONTROLNEXT_DATASET")
WHERE = ("Layer at which control is added: a block of the UNet; in a transformer such as SD3 the image tokens, before "
         "the first block or after one. auto uses the layer that the model was trained with.")
LONGEST_LIST = 250  # characters of the choices in a sentence


def inject_at_input(tooltip: str = WHERE) -> io.Input:
    """The input for ``Settings.inject_at``."""
    return io.Combo.Input("inject_at", options=["auto", *PLACES], default="auto", optional=True, advanced=True,
                          tooltip=tooltip)


def apply_to_input(whose: str = "") -> io.Input:
    """The input for ``Settings.apply_to``."""
    return io.Combo.Input(
        "apply_to", options=["auto", "both", "positive"], default="auto", optional=True, advanced=True,
        tooltip=f"Which conditioning is controlled{whose}. auto does as in training; positive leaves the negative "
                "conditioning without control, which makes control stronger.")


def mask_input() -> io.Input:
    """The input for ``Settings.mask``."""
    return io.Mask.Input("mask", optional=True,
                         tooltip="Area where control acts: fully where the mask is white, not at all where it is "
                                 "black. Give one mask for the whole batch, or one per picture or video frame.")


def window_reference_input() -> io.Input:
    """The input for ``Settings.window_reference``."""
    return io.Combo.Input(
        "window_reference", options=["auto", "on", "off"], default="auto", optional=True, advanced=True,
        tooltip="For long videos in context windows: the first control image, the pose of the picture to animate, "
                "also controls the first frame of every window. auto does as in training.")


def inputs_over_time() -> list[io.Input]:
    """The inputs for ``Settings.curve`` and ``Settings.keyframes``; no curve before ComfyUI has its Curve Editor."""
    keyframes = io.HookKeyframes.Input(
        "strength_keyframes", optional=True, advanced=True,
        tooltip="Strength over time in stages: hook keyframes. Their strengths are multiplied by strength.")
    if CurveInput is None:
        return [keyframes]
    # forceInput: a socket for the Curve Editor node, not an editor inside this one
    return [io.Custom("CURVE").Input(
        "strength_curve", optional=True, advanced=True, extra_dict={"forceInput": True},
        tooltip="Strength over time: a curve from the first step (left) to the last (right). Its values are "
                "multiplied by strength."), keyframes]


def resize_input(auto: str) -> io.Input:
    """The input for ``Settings.resize``, which knows no auto."""
    return io.Combo.Input(
        "resize", options=["auto", *RESIZES], default="auto", optional=True, advanced=True,
        tooltip="What to do with a control image whose size is not that of the picture. stretch: fill the picture, "
                "which may distort. crop: fill it with the middle of the image. pad: put the whole image on black. "
                f"auto is {auto}.")


def checked_inputs(cls, **values) -> dict:
    """These values of a node's inputs, numbers, choices, switches and texts as the types that they are to be.

    ComfyUI looks at what is set on a node, but not at what comes over a link. Other inputs than these pass as they are.

    Args:
        cls: the node; its schema has the ranges and the choices.
        values: by the inputs' names; of a node that takes lists, one of each.

    Raises:
        ValueError: a value is of another type, not finite, out of its range or none of the choices; names the input.
    """
    inputs = {one.id: one for one in cls.define_schema().inputs}
    return {name: _checked(inputs[name], value) for name, value in values.items()}


def _checked(entry: io.Input, value):
    value = value.item() if isinstance(value, np.generic) else value
    match type(entry):
        case io.Int.Input:
            kind, expected = int, f"a whole number from {entry.min} to {entry.max}"
            fits = _is_between(value, entry.min, entry.max) and value == int(value)
        case io.Float.Input:
            kind, expected = float, f"a number from {entry.min} to {entry.max}"
            fits = _is_between(value, entry.min, entry.max)
        case io.Boolean.Input:
            kind, expected = bool, "true or false"
            fits = _is_between(value, 0, 1) and value == int(value)
        case io.Combo.Input:
            kind, expected = str, f"one of {shorten(', '.join(map(quoted, entry.options)), LONGEST_LIST)}"
            fits = isinstance(value, str) and value in entry.options
        case io.String.Input:
            kind, expected = str, "a text"
            fits = isinstance(value, str)
        case _:
            return value
    if not fits:
        raise ValueError(f"{entry.id}: {_shown(value)} came in where {expected} is expected; change it, or what is "
                         "linked to it.")
    return kind(value)


def _is_between(value: object, low: float, high: float) -> bool:
    """Whether it is a number of this range, both ends included; NaN is of none."""
    return isinstance(value, (int, float)) and low <= value <= high


def _shown(value: object) -> str:
    """A value as a sentence names it: short numbers and texts themselves, anything else by its type."""
    if isinstance(value, (str, float)) or isinstance(value, int) and value.bit_length() <= 64:
        return quoted(repr(value))
    return f"a value of type {type(value).__name__}"
