"""Save ControlNeXt UNet Weights as LoRA."""

import os

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io

from ..controlnext_core.unet_weights import lora_key, low_rank
from .inputs import checked_inputs
from .preview import show_text
from .runtime.base_weights import FOLDERS, MODES, BaseWeights, choose_mode, load_unet_weights, remarks
from .runtime.files import fingerprint_listed, list_files, unshared, write_whole


class ControlNeXtSaveAsLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ControlNeXtSaveAsLoRA",
            display_name="Save ControlNeXt UNet Weights as LoRA",
            category="ControlNeXt",
            description="Saves UNet weights as a LoRA file for Load LoRA, so that a shared workflow needs no special "
                        "node.",
            search_aliases=["controlnext", "export lora", "extract lora", "convert unet weights", "save lora"],
            inputs=[
                io.Combo.Input("unet_name", options=list_files(FOLDERS),
                               tooltip="UNet weights (often called unet.safetensors) in models/controlnext, "
                                       "models/controlnet or models/diffusion_models."),
                io.Model.Input("model", tooltip="The MODEL that the weights are for. Full weights are saved as their "
                                                "difference from this MODEL without its LoRAs."),
                io.String.Input("filename_prefix", default="loras/ControlNeXt",
                                tooltip="Path inside the output folder. Load LoRA lists the files in output/loras."),
                io.Int.Input("rank", default=0, min=0, max=4096,
                             tooltip="0 saves the weights in full. A low rank makes a small file that approximates "
                                     "them."),
                io.Combo.Input("mode", options=list(MODES), default="auto", optional=True,
                               tooltip="As in Load ControlNeXt UNet Weights: difference saves the file as it is, "
                                       "replace saves its difference from the MODEL's weights. auto compares the file "
                                       "with the MODEL and shows what it chose."),
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, unet_name: str | None, **_) -> str:
        return fingerprint_listed(unet_name, FOLDERS, "unet_name")

    @classmethod
    def execute(cls, unet_name: str, model, filename_prefix: str, rank: int, mode: str = "auto") -> io.NodeOutput:
        rank, mode = checked_inputs(cls, rank=rank, mode=mode).values()
        base = BaseWeights(model)
        weights = load_unet_weights(unet_name, base)
        mode, why = choose_mode(mode, unet_name, weights, base)
        progress = comfy.utils.ProgressBar(len(weights.tensors))
        lora = {}
        for key, value in weights.tensors.items():
            comfy.model_management.throw_exception_if_processing_interrupted()
            lora |= _lora_tensors(key, value, base if mode == "replace" else None, rank)
            progress.update(1)
        output = folder_paths.get_output_directory()
        folder, filename, counter, _, _ = folder_paths.get_save_image_path(filename_prefix, output)
        path = os.path.join(folder, f"{filename}_{counter:05}_.safetensors")
        with write_whole(path) as part:
            comfy.utils.save_torch_file(unshared(lora), part)
        text = f"{os.path.relpath(path, output)}: {len(weights.tensors)} tensors, {mode} ({why}).{remarks(weights)}"
        return io.NodeOutput(ui=show_text(cls, text))


def _lora_tensors(key: str, value, base: BaseWeights | None, rank: int) -> dict:
    """One weight's tensors in a LoRA file: its difference in full, or ``rank`` of it in half precision."""
    if base is not None:
        weight = base(key)
        value = value.to(weight) - weight
    if not rank or value.ndim < 2:
        return {lora_key(key): value.cpu()}
    value = value.to(comfy.model_management.get_torch_device(), torch.float32)
    name = lora_key(key).removesuffix(".diff")
    return {f"{name}.{part}.weight": tensor.half().cpu()
            for part, tensor in zip(("lora_up", "lora_down"), low_rank(value, rank), strict=True)}
