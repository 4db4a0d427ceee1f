"""ControlNeXt to ControlNet."""

from comfy_api.latest import io

from .inputs import apply_to_input, inject_at_input
from .preview import node_id
from .runtime.control_net import ControlNeXtControlNet
from .runtime.loaded import ControlNeXt, ControlNeXtType
from .runtime.settings import Settings


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
                inject_at_input(),
                apply_to_input(", of the conditionings that it is applied to"),
            ],
            outputs=[io.ControlNet.Output(display_name="control_net", tooltip="For Apply ControlNet.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, controlnext: ControlNeXt, inject_at: str = "auto", apply_to: str = "auto") -> io.NodeOutput:
        asked = Settings(controlnext=controlnext, inject_at=inject_at, apply_to=apply_to, fits_areas=True,
                         node_id=node_id(cls))
        return io.NodeOutput(ControlNeXtControlNet(asked))
