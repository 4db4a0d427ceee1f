"""The beginning of a training: a module and UNet differences, new ones or those that it goes on with."""

import comfy.ops
import torch

from ...controlnext_core.bases import BASES
from ...controlnext_core.families import family_for
from ...controlnext_core.layouts import solve_widths
from ...controlnext_core.module import ControlNeXtModule, new_module
from ...controlnext_core.release_files import with_scale
from ...controlnext_core.sentences import either, quoted
from ...controlnext_core.training import select_weights
from ...controlnext_core.unet_keys import Target
from ..runtime.loaded import ControlNeXt
from ..runtime.places import places_of
from ..runtime.resolve import base_of_model, family_of, model_of
from .control import TrainingControl
from .settings import WITH_UNET, TrainSettings

CLEAR = "clear it to train those that the authors' code trains"


def start_control(model, controlnext: ControlNeXt | None, settings: TrainSettings,
                  input_name: str = "controlnext") -> TrainingControl:
    """The control to train: a new one for this MODEL, or a copy of the one to go on from.

    Args:
        input_name: the input that gave ``controlnext``.

    Raises:
        ValueError: a MODEL that cannot be trained on, or a CONTROLNEXT for another one.
    """
    base = base_of_model(model_of(model))
    family = (family_of(model_of(model), controlnext) if controlnext
              else family_for("light", BASES[base].new_variant, base))
    places, inject_at = places_of(model_of(model).denoiser), settings.inject_at
    if inject_at == "auto":
        inject_at = controlnext and controlnext.place_name or family.place_name
    if inject_at not in places:
        raise ValueError(f"inject_at: control of {family.name} should enter at {quoted(inject_at)}, a place that "
                         f"the connected MODEL lacks; set inject_at to {either(list(places))}.")
    place = places[inject_at]
    if controlnext is None:
        state_dict = new_module(family, settings.seed, out=place.channels).state_dict()
        scale = 1.0
    else:
        found = controlnext.loaded.checkpoint
        state_dict = {key: value.float() for key, value in found.state_dict.items()}
        scale = found.scale
        if found.module.out_channels != place.channels:
            raise ValueError(f"{input_name}: {quoted(controlnext.name)} gives {found.module.out_channels} channels "
                             f"where the connected MODEL takes {place.channels} at {inject_at}; connect the MODEL that "
                             "it is for, or train a new one.")
    learns_scale = settings.scale_learning_rate > 0
    widths = solve_widths({key: value.shape for key, value in state_dict.items()})
    module = ControlNeXtModule(widths, list(state_dict), operations=comfy.ops.manual_cast, dtype=torch.float32,
                               scale=scale if learns_scale else None)
    module.load_state_dict(with_scale(state_dict, scale) if learns_scale else state_dict)
    return TrainingControl(module.to(model.load_device), family, place, inject_at, scale)


def start_differences(model, names: dict[str, Target], shapes: dict[str, tuple], controlnext: ControlNeXt | None,
                      settings: TrainSettings, input_name: str = "controlnext") -> dict[str, torch.Tensor]:
    """{diffusers name: difference to start from} of the UNet weights to train.

    Args:
        names, shapes: the MODEL's weights by their diffusers names, and their shapes by ComfyUI's names.
        input_name: the input that gave ``controlnext``.

    Raises:
        ValueError: the pattern fits none, or those of ``controlnext`` are of another MODEL.
    """
    found = {}
    if settings.trainable == WITH_UNET:
        pattern = settings.unet_pattern or BASES[base_of_model(model_of(model))].unet_pattern
        try:
            selected = select_weights(names, pattern)
        except ValueError as error:
            raise ValueError(f"unet_pattern: {error}; change it or {CLEAR}.") from None
        if not selected:
            raise ValueError(f"unet_pattern: no UNet weight of the connected MODEL has {quoted(pattern)} in its name; "
                             f"{CLEAR}.")
        found = {name: torch.zeros(target.shape(shapes[target.key])) for name, target in selected.items()}
    given = controlnext.unet_differences if controlnext else {}
    if foreign := given.keys() - names.keys():
        raise ValueError(f"{input_name}: {quoted(controlnext.name)} was trained with UNet weights that the connected "
                         f"MODEL lacks ({quoted(min(foreign))}); connect the MODEL that it is for.")
    expected = {name: names[name].shape(shapes[names[name].key]) for name in given}
    if wrong := [name for name, value in given.items() if tuple(value.shape) != expected[name]]:
        raise ValueError(f"{input_name}: {quoted(controlnext.name)} was trained with {quoted(wrong[0])} of shape "
                         f"{quoted(list(given[wrong[0]].shape))} where the connected MODEL has "
                         f"{list(expected[wrong[0]])}; connect the MODEL that it is for.")
    found |= given
    weights = dict(model.model.diffusion_model.named_parameters())
    if any(not weights[names[name].key].is_floating_point() for name in found if names[name].key in weights):
        raise ValueError("trainable: the connected MODEL is in GGUF, whose layers add nothing to their weights while "
                         "they train; connect the same model in fp16 or fp8, or set trainable to module.")
    return {name: value.to(model.load_device) for name, value in found.items()}
