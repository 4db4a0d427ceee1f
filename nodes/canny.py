"""ControlNeXt Canny."""

import torch
from comfy_api.latest import io

from ..controlnext_core.canny import edges
from .inputs import checked_inputs
from .runtime.images import checked_image


class ControlNeXtCanny(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ControlNeXtCanny",
            display_name="ControlNeXt Canny",
            category="ControlNeXt",
            description="Canny edges as the SDXL Canny weights saw them in training: the thresholds follow the "
                        "picture's median brightness.",
            search_aliases=["canny", "edge detection", "controlnext canny", "canny control", "edges", "lineart",
                            "outline"],
            inputs=[
                io.Image.Input("image", tooltip="The picture to take edges from."),
                io.Combo.Input("threshold", options=["auto", "manual"], default="auto",
                               tooltip="auto: 0.67 and 1.33 times the median brightness, as in training. manual: the "
                                       "two values below."),
                io.Int.Input("low_threshold", default=100, min=0, max=255,
                             tooltip="For manual: edges weaker than this are dropped."),
                io.Int.Input("high_threshold", default=200, min=0, max=255,
                             tooltip="For manual: edges stronger than this are always kept."),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="White edges on black.")],
        )

    @classmethod
    def execute(cls, image: torch.Tensor, threshold: str, low_threshold: int, high_threshold: int) -> io.NodeOutput:
        checked = checked_inputs(cls, threshold=threshold, low_threshold=low_threshold, high_threshold=high_threshold)
        threshold, low_threshold, high_threshold = checked.values()
        if not torch.isfinite(checked_image(image)).all():
            raise ValueError("image: the picture holds NaN or infinite values; check the node that made it.")
        thresholds = None if threshold == "auto" else (low_threshold, high_threshold)
        return io.NodeOutput(edges(image, thresholds))
