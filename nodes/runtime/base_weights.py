"""The UNet weights of a MODEL as they are without what was added to them, and files of weights that are added."""

import sys

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from comfy.quant_ops import QuantizedTensor

from ...controlnext_core.release_files import MODE_KEY
from ...controlnext_core.sentences import quoted
from ...controlnext_core.unet_weights import UNetWeights, compare, match_weights, move_to_base, split_patches
from .files import find_file, read_weights
from .resolve import base_of_model, model_of

FOLDERS = ("controlnext", "controlnet", "diffusion_models")
MODES = ("auto", "difference", "replace")
PREFIX = "diffusion_model."
NAMED_KEYS = 5


class BaseWeights:
    """The UNet weights of a MODEL (a ModelPatcher) with merges and replacements, without LoRAs and differences.

    Quantised ones (8-bit floats, scaled ones, GGUF) have the shape and the values that the MODEL computes with.

    Attributes:
        rounded: what is added to them ends in 8 bits again, as ComfyUI keeps them.

    Raises:
        ValueError: they are packed in a form that only the MODEL's own layers read.
    """

    def __init__(self, model):
        self.model = model
        parameters = dict(model.model.named_parameters())
        # a quantised layer's state dict holds its scales too, and its weights as they are stored
        weights = parameters | dict(model.model.named_buffers())
        self.shapes = {key[len(PREFIX):]: tuple(weights[key].shape) for key in model.model_state_dict(PREFIX)
                       if key in weights}
        for key, weight in parameters.items():
            if not weight.is_floating_point() and _ggml_dequantize(weight) is None:
                layer = type(comfy.utils.get_attr(model.model, key.rpartition(".")[0]))
                raise ValueError(f"model: the weights of the connected MODEL are packed as "
                                 f"{str(weight.dtype).removeprefix('torch.')} in layers of {layer.__qualname__}, which "
                                 "ComfyUI can neither read nor add to; connect the same model in fp16, fp8 or GGUF.")
        self.rounded = any(isinstance(weight, QuantizedTensor) or weight.is_floating_point() and weight.itemsize == 1
                           for weight in parameters.values())

    def __call__(self, key: str) -> torch.Tensor:
        """One weight in float32, by its name without ``diffusion_model.``."""
        key = PREFIX + key
        # as in ModelPatcher.get_key_patches, which fails on a quantised layer's scales
        weight, _, convert = comfy.model_patcher.get_key_weight(self.model.model, key)
        if key in self.model.backup:
            weight = self.model.backup[key].weight
        if key in self.model.hook_backup:
            weight = self.model.hook_backup[key][0]
        device = comfy.model_management.get_torch_device()
        if weight.is_floating_point():
            weight = comfy.model_management.cast_to_device(weight, device, torch.float32, copy=True)
        else:
            weight = _ggml_dequantize(weight)(weight.to(device), torch.float32)
        if convert is not None:
            weight = convert(weight, inplace=True)
        base_patches, _ = split_patches(self.model.patches.get(key, ()))
        return comfy.lora.calculate_weight(base_patches, weight.as_subclass(torch.Tensor), key)


def _ggml_dequantize(weight: torch.Tensor):
    """ComfyUI-GGUF's own function for its tensors, which stands beside their class; None for any other tensor."""
    return getattr(sys.modules[type(weight).__module__], "dequantize_tensor", None)


def load_unet_weights(name: str, base: BaseWeights) -> UNetWeights:
    """Read a file for the MODEL of ``base``. ValueError: one sentence that names the input, also for other bases."""
    base_of_model(model_of(base.model))
    state_dict, metadata = read_weights(find_file(name, FOLDERS, "unet_name"), name, "unet_name")
    try:
        return match_weights(state_dict, name, base.shapes, metadata.get(MODE_KEY))
    except ValueError as error:
        raise ValueError(f"unet_name: {error}") from None


def choose_mode(mode: str, name: str, weights: UNetWeights, base: BaseWeights) -> tuple[str, str]:
    """(difference or replace, why): what the user chose, the file declares, or comparing with the base weights says."""
    mode, why = _mode_of(mode, weights, base)
    if mode == "replace" and weights.partial:
        raise ValueError(f"mode: {quoted(name)} holds some of the query, key and value weights that lie together in "
                         f"{weights.partial[0]}, which can be added but not replaced ({why}); set mode to difference "
                         "or choose a file with all three.")
    return mode, why


def _mode_of(mode: str, weights: UNetWeights, base: BaseWeights) -> tuple[str, str]:
    if mode != "auto":
        return mode, "as chosen"
    if weights.declared in MODES[1:]:
        return weights.declared, "auto: the file says so"
    likeness = compare(weights.tensors, base)
    resemble = "resemble" if likeness.mode == "replace" else "do not resemble"
    return likeness.mode, (f"auto: they {resemble} the MODEL's own, with cosine {likeness.cosine:.2f} and "
                           f"{likeness.size:.2g} times their size")


def remarks(weights: UNetWeights) -> str:
    """Further remarks on a file that was read: keys that were left out, a base that looks wrong."""
    text = ""
    if weights.left_out:
        names = ", ".join(quoted(key) for key in weights.left_out[:NAMED_KEYS])
        more = ", ..." if len(weights.left_out) > NAMED_KEYS else ""
        text += f" {len(weights.left_out)} tensors that this MODEL lacks were left out: {names}{more}."
    if weights.other_base:
        text += f" All of them fit this MODEL, yet they look made for {weights.other_base}."
    return text


def add_unet_weights(model, weights: UNetWeights, mode: str, strength: float):
    """A clone of ``model`` with the weights as ComfyUI weight patches; LoRAs stay on top of them."""
    model = model.clone()
    patches = {PREFIX + key: ("diff", (value,)) for key, value in weights.tensors.items()}
    for key in model.add_patches(patches, strength, 1.0 - strength if mode == "replace" else 1.0):
        model.patches[key] = move_to_base(model.patches[key])
    return model
