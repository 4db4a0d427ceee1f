"""The denoiser under training: a clone of the MODEL that gradients can pass, and the MODEL's layers as they were."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ...controlnext_core.unet_keys import Target
from ..runtime.places import adds_in_place, blocks_of, is_fused, writes_over
from .control import TrainingControl

PREFIX = "diffusion_model."
# attributes of a layer that unloading does not take off again
LEFT_BY_LOADING = {"forward", "comfy_cast_weights", "comfy_force_cast_weights"}


def trainable_clone(model, control: TrainingControl, differences: dict[Target, torch.nn.Parameter], dtype: torch.dtype,
                    checkpointing: bool):
    """A clone of a MODEL that gradients can pass, with ``differences`` added where they belong while ``control`` acts.

    All of it goes through the patcher; the weights that the clone shares with the MODEL are not touched.
    """
    clone = model.clone(disable_dynamic=True)
    clone.set_model_compute_dtype(dtype)
    for key, weight in clone.model.named_parameters():
        # autograd cannot save what was made under inference mode, and moving it later hides that it was; a copy it can
        if hasattr(comfy.utils.get_attr(clone.model, key.rpartition(".")[0]), "weight_function"):
            clone.add_weight_wrapper(key, _as_copied)
        else:  # a layer that is none of ComfyUI's own: SD3's norm of q and k
            clone.add_object_patch(key, torch.nn.Parameter(weight.detach().clone(), requires_grad=False))

    for target, difference in differences.items():
        clone.add_weight_wrapper(PREFIX + target.key, _adder(control, target, difference))

    denoiser = clone.model.diffusion_model
    blocks = set(blocks_of(denoiser))
    asked = {OutOfPlace: adds_in_place, CopiesToNorms: writes_over, PlainKernels: is_fused}
    modes = [mode for mode, needed_by in asked.items() if needed_by(denoiser)]
    for name, layer in clone.model.named_modules():
        if layer in blocks:
            forward = _in_modes(layer.forward, modes) if modes else layer.forward
            forward = _on_copies(forward) if CopiesToNorms in modes else forward
            clone.add_object_patch(f"{name}.forward", _checkpointed(forward) if checkpointing else forward)
    return clone


@contextmanager
def loaded_for_training(clone, models: list) -> Iterator[None]:
    """Have ComfyUI load a trainable clone with other models, whole; afterwards nothing of it is left on the MODEL.

    The MODEL shares its layers with the clone: what loading leaves on them goes with the training.
    """
    layers = {layer: dict(vars(layer)) for layer in clone.model.modules()}
    learning = [parameter for parameter in clone.model.parameters() if parameter.requires_grad]
    try:
        comfy.model_management.in_training = True
        clone.model.requires_grad_(False)
        comfy.model_management.load_models_gpu([clone, *models], memory_required=1e20, force_full_load=True)
        clone.pre_run()
        yield
    finally:
        comfy.model_management.in_training = False
        clone.cleanup()
        # ComfyUI takes additions off only when it loads a model again
        comfy.model_management.unload_all_models()
        for layer, before in layers.items():
            comfy.model_patcher.wipe_lowvram_weight(layer)
            for name in LEFT_BY_LOADING & vars(layer).keys() - before.keys():
                delattr(layer, name)
            if "comfy_force_cast_weights" in before:
                layer.comfy_force_cast_weights = before["comfy_force_cast_weights"]
        with torch.inference_mode():  # where those were made that a node loaded
            for parameter in learning:
                parameter.requires_grad_(True)


def _as_copied(weight: torch.Tensor) -> torch.Tensor:
    """The weight as it is: ComfyUI copies every weight that a function is to see."""
    return weight


def _adder(control: TrainingControl, target: Target, difference: torch.nn.Parameter):
    def add(weight: torch.Tensor) -> torch.Tensor:
        if not control.acting:
            return weight
        return (weight.float() + target.spread(difference, len(weight))).to(weight.dtype)
    return add


class OutOfPlace(TorchFunctionMode):
    """In it ``a += b`` makes another tensor: Flux's blocks add to what their norms need again for gradients."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.add_:  # PyTorch's name for it
            return torch.Tensor.add(*args, **(kwargs or {})).to(args[0].dtype)
        return func(*args, **(kwargs or {}))


class CopiesToNorms(TorchFunctionMode):
    """In it norms get copies: LTX's blocks write over what they took where that is no assignment."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.rms_norm:
            args = args[0].clone(), *args[1:]
        return func(*args, **(kwargs or {}))


class PlainKernels(TorchFunctionMode):
    """In it kernels of ComfyUI's that pass no gradients are the computations of torch's that they stand for."""

    def __init__(self):
        super().__init__()
        from comfy_kitchen.backends import eager  # which older versions of ComfyUI have without these
        self.plain = {torch.ops.comfy_kitchen.rms_rope_split_half: eager.rms_rope_split_half}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.plain.get(func, func)(*args, **(kwargs or {}))


def _in_modes(forward, modes: list[type[TorchFunctionMode]]):
    def run(*args, **kwargs):
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode())
            return forward(*args, **kwargs)
    return run


def _on_copies(forward):
    """The forward of a block that writes over its tokens, which a checkpoint gives it a second time."""
    def run(tokens, *args, **kwargs):
        copies = tuple(one.clone() for one in tokens) if isinstance(tokens, tuple) else tokens.clone()
        return forward(copies, *args, **kwargs)
    return run


def _checkpointed(forward):
    def run(*args, **kwargs):
        # the denoiser writes into its options which block runs; the second time it is to find what stood there
        args = [dict(value) if isinstance(value, dict) else value for value in args]
        kwargs = {name: dict(value) if isinstance(value, dict) else value for name, value in kwargs.items()}
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return run
