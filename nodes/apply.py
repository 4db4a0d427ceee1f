"""Apply ControlNeXt."""

import torch
from comfy_api.latest import io

from .inputs import (
    apply_to_input,
    checked_inputs,
    inject_at_input,
    inputs_over_time,
    mask_input,
    resize_input,
    window_reference_input,
)
from .preview import node_id, show_strength, show_text
from .runtime.images import checked_mask, control_image
from .runtime.loaded import ControlNeXt, ControlNeXtType
from .runtime.resolve import FEW_BITS, computes_in_few_bits, model_of, resolve
from .runtime.run import add_settings
from .runtime.settings import Settings


class ControlNeXtApply(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ControlNeXtApply",
            display_name="Apply ControlNeXt",
            category="ControlNeXt",
            description="Makes a MODEL follow a control image; connect its output to any sampler.",
            search_aliases=["controlnext", "controlnet", "apply controlnet", "canny control", "edges", "lineart",
                            "pose control", "openpose", "dwpose", "pose video", "depth control"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL to control; it is not changed."),
                ControlNeXtType.Input("controlnext", tooltip="From Load ControlNeXt Model."),
                io.Image.Input("image",
                               tooltip="The control image (edges, pose, depth, mask ...). It is resized to the "
                                       "picture. Give one image for the whole batch, or one per picture or video "
                                       "frame."),
                io.Float.Input("strength", default=1.0, min=0.0, max=10.0, step=0.01,
                               tooltip="How closely the picture follows the control image; 0 is off. Most models were "
                                       "trained at 1, the SDXL Canny weights at 0.35."),
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.001,
                               tooltip="When control starts, as a fraction of the sampling: 0 is the first step."),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.001,
                               tooltip="When control ends, as a fraction of the sampling: 1 is the last step."),
                mask_input(),
                inject_at_input(),
                apply_to_input(),
                window_reference_input(),
                *inputs_over_time(),
                resize_input("stretch, as in training"),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The controlled MODEL.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, controlnext: ControlNeXt, image: torch.Tensor, strength: float, start_percent: float,
                end_percent: float, mask: torch.Tensor | None = None, inject_at: str = "auto",
                apply_to: str = "auto", window_reference: str = "auto", strength_curve=None,
                strength_keyframes=None, resize: str = "auto") -> io.NodeOutput:
        checked = checked_inputs(
            cls, strength=strength, start_percent=start_percent, end_percent=end_percent, inject_at=inject_at,
            apply_to=apply_to, window_reference=window_reference, resize=resize)
        strength, start_percent, end_percent, inject_at, apply_to, window_reference, resize = checked.values()
        if start_percent >= end_percent:
            raise ValueError(f"start_percent: {start_percent:g} is not before end_percent {end_percent:g}; set "
                             f"start_percent below end_percent.")
        control_image(image)
        if mask is not None:
            mask = checked_mask(mask)
            strength = strength if mask.any() else 0.0

        settings = Settings(
            controlnext=controlnext, image=image, mask=mask, strength=strength, start_percent=start_percent,
            end_percent=end_percent, curve=strength_curve, keyframes=strength_keyframes, inject_at=inject_at,
            apply_to=apply_to, window_reference=window_reference,
            resize="stretch" if resize == "auto" else resize, node_id=node_id(cls))
        running = model_of(model)
        resolve(running, settings)  # a control that does not fit is told here already, not only when the MODEL runs
        shown = show_strength(settings)
        if strength == 0.0:
            return io.NodeOutput(model, ui=shown)
        if computes_in_few_bits(running):
            shown |= show_text(cls, FEW_BITS).as_dict()
        return io.NodeOutput(add_settings(model, settings), ui=shown)

