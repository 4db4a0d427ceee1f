"""ControlNeXt to ControlNet."""

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
from .preview import node_id
from .runtime.control_net import ControlNeXtControlNet
from .runtime.images import checked_mask
from .runtime.loaded import ControlNeXt, ControlNeXtType
from .runtime.settings import Settings


class ControlNeXtToControlNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ControlNeXtToControlNet",
            display_name="ControlNeXt to ControlNet",
            category="ControlNeXt",
            description="Turns a ControlNeXt model into a CONTROL_NET for Apply ControlNet and other nodes that take "
                        "one: separate control for each prompt or region, tiled upscaling, detailers, chains with "
                        "other ControlNets.",
            search_aliases=["controlnext", "controlnet", "apply controlnet", "regional control", "tile control",
                            "upscale", "convert controlnext"],
            inputs=[
                ControlNeXtType.Input("controlnext", tooltip="From Load ControlNeXt Model."),
                inject_at_input(),
                apply_to_input(", of those that Apply ControlNet gets"),
                mask_input(),
                window_reference_input(),
                *inputs_over_time(),
                resize_input("crop, as with ComfyUI's ControlNets"),
            ],
            outputs=[io.ControlNet.Output(display_name="control_net", tooltip="For Apply ControlNet.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, controlnext: ControlNeXt, inject_at: str = "auto", apply_to: str = "auto",
                mask: torch.Tensor | None = None, window_reference: str = "auto", strength_curve=None,
                strength_keyframes=None, resize: str = "auto") -> io.NodeOutput:
        checked = checked_inputs(cls, inject_at=inject_at, apply_to=apply_to, window_reference=window_reference,
                                 resize=resize)
        inject_at, apply_to, window_reference, resize = checked.values()
        asked = Settings(
            controlnext=controlnext, mask=None if mask is None else checked_mask(mask), curve=strength_curve,
            keyframes=strength_keyframes, inject_at=inject_at, apply_to=apply_to, window_reference=window_reference,
            resize="crop" if resize == "auto" else resize, fits_areas=True, node_id=node_id(cls))
        return io.NodeOutput(ControlNeXtControlNet(asked))
