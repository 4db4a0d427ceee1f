"""Load ControlNeXt Model."""

from comfy_api.latest import io

from ..controlnext_core.bases import BASES
from ..controlnext_core.families import FAMILIES, families_of
from .inputs import checked_inputs
from .preview import show_text
from .runtime.files import fingerprint_listed, list_files
from .runtime.loaded import FOLDERS, ControlNeXt, ControlNeXtType, load_controlnext


class ControlNeXtLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ControlNeXtLoader",
            display_name="Load ControlNeXt Model",
            category="ControlNeXt",
            description="Loads a ControlNeXt control model, the small network that reads the control image.",
            search_aliases=["controlnext", "controlnet", "load controlnext", "control loader"],
            inputs=[
                io.Combo.Input("controlnext_name", options=list_files(FOLDERS),
                               tooltip="A ControlNeXt file in models/controlnext or models/controlnet (7 to 22 MB)."),
                io.Combo.Input("variant", options=["auto", *FAMILIES], default="auto",
                               tooltip="Model family of the file. auto reads it from the file and the connected "
                                       "MODEL; choose svd_padded yourself for files trained with the authors' "
                                       "SVD-v2-Training code."),
            ],
            outputs=[ControlNeXtType.Output(display_name="controlnext", tooltip="For Apply ControlNeXt.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, controlnext_name: str | None, **_) -> str:
        return fingerprint_listed(controlnext_name, FOLDERS, "controlnext_name")

    @classmethod
    def execute(cls, controlnext_name: str, variant: str) -> io.NodeOutput:
        variant, = checked_inputs(cls, variant=variant).values()
        controlnext = load_controlnext(controlnext_name, variant)
        return io.NodeOutput(controlnext, ui=show_text(cls, _describe(controlnext)))


def _describe(controlnext: ControlNeXt) -> str:
    """Family, base model, size and precision of what was loaded."""
    families = families_of(controlnext.loaded.checkpoint.layout)
    if controlnext.variant != "auto":
        families = [FAMILIES[controlnext.variant]]
    parameters = list(controlnext.loaded.checkpoint.module.parameters())
    size = sum(parameter.numel() for parameter in parameters) / 1e6
    precision = str(parameters[0].dtype).removeprefix("torch.")
    if len(families) > 1:
        return f"{size:.2f} million parameters, {precision}; the connected MODEL tells which family it is"
    family, = families
    return f"{family.name} for {BASES[family.base].title}, {size:.2f} million parameters, {precision}"
