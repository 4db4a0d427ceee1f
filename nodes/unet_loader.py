"""Load ControlNeXt UNet Weights."""

from comfy_api.latest import io

from .inputs import checked_inputs
from .preview import show_text
from .runtime.base_weights import (
    FOLDERS,
    MODES,
    BaseWeights,
    add_unet_weights,
    choose_mode,
    load_unet_weights,
    remarks,
)
from .runtime.files import fingerprint_listed, list_files

ROUNDED = (" The connected MODEL is kept in 8 bits, to which ComfyUI rounds the sum, so the effect of control is off "
           "by a few percent; connect the same model in fp16 or GGUF to avoid that.")


class ControlNeXtUNetLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ControlNeXtUNetLoader",
            display_name="Load ControlNeXt UNet Weights",
            category="ControlNeXt",
            description="Applies the second file of a ControlNeXt release, fine-tuned UNet weights, to a MODEL. "
                        "Without it control is weak. LoRAs can come before or after.",
            search_aliases=["controlnext", "unet weights", "unet difference", "delta", "weight increments"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL to apply the weights to; it is not changed."),
                io.Combo.Input("unet_name", options=list_files(FOLDERS),
                               tooltip="UNet weights (often called unet.safetensors) in models/controlnext, "
                                       "models/controlnet or models/diffusion_models."),
                io.Float.Input("strength", default=1.0, min=-2.0, max=2.0, step=0.01,
                               tooltip="How much of the weights is applied: 1 is as trained, 0 is nothing."),
                io.Combo.Input("mode", options=list(MODES), default="auto",
                               tooltip="difference adds the file to the MODEL's weights, replace replaces them. auto "
                                       "compares the file with the MODEL and shows what it chose."),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The MODEL with the weights applied.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, unet_name: str | None, **_) -> str:
        return fingerprint_listed(unet_name, FOLDERS, "unet_name")

    @classmethod
    def execute(cls, model, unet_name: str, strength: float, mode: str) -> io.NodeOutput:
        strength, mode = checked_inputs(cls, strength=strength, mode=mode).values()
        if strength == 0.0:
            return io.NodeOutput(model)
        base = BaseWeights(model)
        weights = load_unet_weights(unet_name, base)
        mode, why = choose_mode(mode, unet_name, weights, base)
        how = "added as differences" if mode == "difference" else "put in place of the MODEL's"
        text = f"{unet_name}: {len(weights.tensors)} tensors {how} at strength {strength:g} ({why}).{remarks(weights)}"
        if base.rounded:
            text += ROUNDED
        return io.NodeOutput(add_unet_weights(model, weights, mode, strength), ui=show_text(cls, text))
