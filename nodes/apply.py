"""Apply ControlNeXt."""

import comfy.model_base
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy_api.latest import io

from ..controlnext_core.families import Family, resolve
from ..controlnext_core.sizes import as_rgb
from .control import Control
from .injection import add_control
from .model import ControlNeXt, ControlNeXtType
from .places import PLACES, Place, places_of
from .preview import show_strength
from .strength_over_time import CurveInput, StrengthOverTime


class ControlNeXtApply(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ControlNeXtApply",
            display_name="Apply ControlNeXt",
            category="ControlNeXt",
            description="Makes a MODEL follow a control image; connect its output to any sampler.",
            search_aliases=["controlnext", "controlnet", "apply controlnet", "canny control", "pose control",
                            "pose video"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL to control; it is not changed."),
                ControlNeXtType.Input("controlnext", tooltip="From Load ControlNeXt Model."),
                io.Image.Input("image",
                               tooltip="The control image (edges, pose, depth, mask ...), resized to the picture. "
                                       "One for the whole batch, or one per picture or video frame."),
                io.Float.Input("strength", default=1.0, min=0.0, max=10.0, step=0.01,
                               tooltip="How strongly control acts. 1 is as the model was trained, 0 is off."),
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.001,
                               tooltip="When control begins: 0 is the first step of the sampling, 1 the last."),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.001,
                               tooltip="When control ends: 1 keeps it to the last step."),
                io.Mask.Input("mask", optional=True, tooltip="Where control acts: white fully, black not at all."),
                io.Combo.Input("inject_at", options=["auto", *PLACES], default="auto", optional=True, advanced=True,
                               tooltip="Where control enters the UNet. auto is where the model was trained to enter."),
                io.Combo.Input("apply_to", options=["auto", "both", "positive"], default="auto", optional=True,
                               advanced=True,
                               tooltip="Which guidance halves are controlled. auto is how the model was trained; "
                                       "positive leaves the negative half alone, which makes control stronger."),
                io.Combo.Input("window_reference", options=["auto", "on", "off"], default="auto", optional=True,
                               advanced=True,
                               tooltip="Long videos in context windows: lets the first control image, the pose of the "
                                       "picture that is animated, control the first frame of every window. auto is how "
                                       "the model was trained."),
                *_inputs_over_time(),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The controlled MODEL.")],
        )

    @classmethod
    def execute(cls, model, controlnext: ControlNeXt, image: torch.Tensor, strength: float, start_percent: float,
                end_percent: float, mask: torch.Tensor | None = None, inject_at: str = "auto",
                apply_to: str = "auto", window_reference: str = "auto", strength_curve=None,
                strength_keyframes=None) -> io.NodeOutput:
        if start_percent >= end_percent:
            raise ValueError(f"start_percent: {start_percent:g} is not before end_percent {end_percent:g}; set "
                             f"start_percent below end_percent.")
        image = as_rgb(image)
        if not torch.isfinite(image).all():
            raise ValueError("image: the control image holds NaN or infinite values; check the node that made it.")
        family = family_of(model.model, controlnext)
        place = _place(model.model, controlnext, family.place if inject_at == "auto" else inject_at)
        if mask is not None:
            mask = mask.reshape(-1, *mask.shape[-2:])
            mask, strength = (None, strength) if (mask == 1).all() else (mask, strength if mask.any() else 0.0)
        sampling = model.get_model_object("model_sampling")
        over_time = None
        if strength_curve is not None or strength_keyframes is not None:
            over_time = StrengthOverTime(sampling, strength_curve, strength_keyframes)
        chart = show_strength(strength, start_percent, end_percent, over_time)
        if strength == 0.0:
            return io.NodeOutput(model, ui=chart)
        positive, negative = family.gains(controlnext.loaded.checkpoint.scale)
        negative = {"auto": negative, "both": positive, "positive": 0.0}[apply_to]
        control = Control(
            controlnext, family, place, image, mask, (strength * positive, strength * negative),
            (float(sampling.percent_to_sigma(start_percent)), float(sampling.percent_to_sigma(end_percent))),
            model.get_model_object("latent_format").spacial_downscale_ratio,
            {"auto": family.window_reference, "on": True, "off": False}[window_reference], over_time,
        )
        return io.NodeOutput(add_control(model, control), ui=chart)


def _inputs_over_time() -> list[io.Input]:
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


def base_of_model(base_model) -> str:
    """The base (a key of ``BASE_NAMES``) of a MODEL. ValueError: no UNet."""
    if not isinstance(base_model.diffusion_model, UNetModel):
        raise ValueError(f"model: ControlNeXt steers SD1.5, SDXL and SVD models; the connected MODEL is a "
                         f"{type(base_model).__name__}, which is not supported yet.")
    if isinstance(base_model, comfy.model_base.SVD_img2vid):
        return "svd"
    return "sdxl" if isinstance(base_model, comfy.model_base.SDXL) else "sd15"


def family_of(base_model, controlnext: ControlNeXt) -> Family:
    """The file's family for this MODEL. ValueError: no UNet, or a UNet of another base."""
    return resolve(controlnext.loaded.checkpoint.layout, controlnext.variant, base_of_model(base_model))


def _place(base_model, controlnext: ControlNeXt, name: str) -> Place:
    """The named place of this MODEL. ValueError: it has no such place, or one of another width; says which fit."""
    places = places_of(base_model.diffusion_model)
    channels = controlnext.loaded.checkpoint.module.out_channels
    fitting = [other for other, place in places.items() if place.channels == channels]
    if name in fitting:
        return places[name]
    found = f"is {places[name].channels} channels wide there" if name in places else "has no such place"
    advice = (f"set inject_at to {' or '.join(fitting)}" if fitting
              else "none of its places fits, so choose a ControlNeXt file made for this MODEL")
    raise ValueError(f"inject_at: {controlnext.name} gives {channels} channels and should enter at {name}, but the "
                     f"connected MODEL {found}; {advice}.")
