"""Load ControlNeXt Model."""

from comfy_api.latest import io

from ..controlnext_core.families import FAMILIES
from .files import list_files
from .model import FOLDERS, ControlNeXtType, load_controlnext


class ControlNeXtLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ControlNeXtLoader",
            display_name="Load ControlNeXt Model",
            category="ControlNeXt",
            description="Loads a ControlNeXt model, the small module that reads the control image.",
            search_aliases=["controlnext", "controlnet", "load controlnext", "control loader"],
            inputs=[
                io.Combo.Input("controlnext_name", options=list_files(FOLDERS),
                               tooltip="A ControlNeXt file in models/controlnext or models/controlnet (7 to 22 MB)."),
                io.Combo.Input("variant", options=["auto", *FAMILIES], default="auto",
                               tooltip="Which release the file is from. auto reads it off the file and the connected "
                                       "MODEL; choose svd_padded for files from the SVD v2 training code."),
            ],
            outputs=[ControlNeXtType.Output(display_name="controlnext", tooltip="For Apply ControlNeXt.")],
        )

    @classmethod
    def execute(cls, controlnext_name: str, variant: str) -> io.NodeOutput:
        return io.NodeOutput(load_controlnext(controlnext_name, variant))
