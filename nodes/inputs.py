"""Inputs that several nodes have."""

from comfy_api.latest import io

from .runtime.places import PLACES

PoseKeypoint = io.Custom("POSE_KEYPOINT")
WHERE = ("Where control enters the UNet, or the tokens of a transformer such as SD3: at once or after a block. auto is "
         "where the model was trained to enter.")


def inject_at_input(tooltip: str = WHERE) -> io.Input:
    """What ``settle`` takes as ``inject_at``."""
    return io.Combo.Input("inject_at", options=["auto", *PLACES], default="auto", optional=True, advanced=True,
                          tooltip=tooltip)


def apply_to_input(whose: str = "") -> io.Input:
    """What ``settle`` takes as ``apply_to``."""
    return io.Combo.Input(
        "apply_to", options=["auto", "both", "positive"], default="auto", optional=True, advanced=True,
        tooltip=f"Which guidance halves are controlled{whose}. auto is how the model was trained; positive leaves the "
                "negative half alone, which makes control stronger.")
