"""Inputs that several nodes have."""

from comfy_api.latest import io

from .runtime.images import RESIZES
from .runtime.places import PLACES
from .runtime.strength_over_time import CurveInput

PoseKeypoint = io.Custom("POSE_KEYPOINT")
WHERE = ("Where control enters the UNet, or the tokens of a transformer such as SD3: at once or after a block. auto is "
         "where the model was trained to enter.")


def inject_at_input(tooltip: str = WHERE) -> io.Input:
    """The input for ``Settings.inject_at``."""
    return io.Combo.Input("inject_at", options=["auto", *PLACES], default="auto", optional=True, advanced=True,
                          tooltip=tooltip)


def apply_to_input(whose: str = "") -> io.Input:
    """The input for ``Settings.apply_to``."""
    return io.Combo.Input(
        "apply_to", options=["auto", "both", "positive"], default="auto", optional=True, advanced=True,
        tooltip=f"Which guidance halves are controlled{whose}. auto is how the model was trained; positive leaves the "
                "negative half alone, which makes control stronger.")


def mask_input() -> io.Input:
    """The input for ``Settings.mask``."""
    return io.Mask.Input("mask", optional=True,
                         tooltip="Where control acts: white fully, black not at all. One for the whole batch, or one "
                                 "per picture or video frame.")


def window_reference_input() -> io.Input:
    """The input for ``Settings.window_reference``."""
    return io.Combo.Input(
        "window_reference", options=["auto", "on", "off"], default="auto", optional=True, advanced=True,
        tooltip="Long videos in context windows: lets the first control image, the pose of the picture that is "
                "animated, control the first frame of every window. auto is how the model was trained.")


def inputs_over_time() -> list[io.Input]:
    """The inputs for ``Settings.curve`` and ``Settings.keyframes``; no curve before ComfyUI has its Curve Editor."""
    keyframes = io.HookKeyframes.Input(
        "strength_keyframes", optional=True, advanced=True,
        tooltip="Strength over time in steps: hook keyframes, whose strengths multiply strength.")
    if CurveInput is None:
        return [keyframes]
    # forceInput: a socket for the Curve Editor node, not an editor inside this one
    return [io.Custom("CURVE").Input(
        "strength_curve", optional=True, advanced=True, extra_dict={"forceInput": True},
        tooltip="Strength over time: a curve that multiplies strength, from the first step (left) to the last "
                "(right)."), keyframes]


def resize_input(auto: str) -> io.Input:
    """The input for ``Settings.resize``, which knows no auto."""
    return io.Combo.Input(
        "resize", options=["auto", *RESIZES], default="auto", optional=True, advanced=True,
        tooltip="How a control image of another size becomes as large as the picture: stretch fills it, crop fills it "
                f"with the middle of the image, pad puts the whole image on black. {auto}.")
