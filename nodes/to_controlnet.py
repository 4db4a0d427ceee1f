"""ControlNeXt to ControlNet."""

from comfy_api.latest import io

from .controlnet import ControlNeXtControl
from .model import ControlNeXt, ControlNeXtType
from .places import PLACES


class ControlNeXtToControlNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ControlNeXtToControlNet",
            display_name="ControlNeXt to ControlNet",
            category="ControlNeXt",
            description="A ControlNeXt for Apply ControlNet and everything else that takes a ControlNet: a control for "
                        "each prompt or region, tiled upscaling, detailers, chains with ControlNets.",
            search_aliases=["controlnext", "controlnet", "apply controlnet", "regional control", "tile control",
                            "convert controlnext"],
            inputs=[
                ControlNeXtType.Input("controlnext", tooltip="From Load ControlNeXt Model."),
                io.Combo.Input("inject_at", options=["auto", *PLACES], default="auto", optional=True, advanced=True,
                               tooltip="Where control enters the UNet. auto is where the model was trained to enter."),
                io.Combo.Input("apply_to", options=["auto", "both", "positive"], default="auto", optional=True,
                               advanced=True,
                               tooltip="Which guidance halves are controlled, of the conditionings that it is applied "
                                       "to. auto is how the model was trained; positive leaves the negative half "
                                       "alone, which makes control stronger."),
            ],
            outputs=[io.ControlNet.Output(display_name="control_net", tooltip="For Apply ControlNet.")],
        )

    @classmethod
    def execute(cls, controlnext: ControlNeXt, inject_at: str = "auto", apply_to: str = "auto") -> io.NodeOutput:
        return io.NodeOutput(ControlNeXtControl(controlnext, inject_at, apply_to))
