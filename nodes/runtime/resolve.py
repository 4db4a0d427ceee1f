"""A control's family, place, gains and steps for the model that runs, or one sentence on why it does not fit."""

from dataclasses import dataclass

from ...controlnext_core.bases import BASES
from ...controlnext_core.families import Family, family_for
from ...controlnext_core.sentences import either, listed, quoted
from .loaded import ControlNeXt
from .places import Place, base_of, kind_of, no_way_into, places_of, unwrapped
from .settings import Settings
from .strength_over_time import StrengthOverTime

FEW_BITS = ("The connected MODEL multiplies in 8 bits or fewer, so the effect of control, like the whole picture, is "
            "off by a few percent; connect the same model in fp16 or GGUF to avoid that.")


@dataclass(frozen=True)
class RunningModel:
    """A MODEL as it runs, with the object patches of its ModelPatcher.

    Attributes:
        base_model: ComfyUI's BaseModel.
        denoiser: its network itself, also where torch.compile stands before it.
        sampling: its model_sampling.
        ratio: pixels of the image that one latent pixel stands for.
    """

    base_model: object
    denoiser: object
    sampling: object
    ratio: int


def model_of(patcher) -> RunningModel:
    """The RunningModel of a ModelPatcher, whatever other clones of it have left in the layers that they share."""
    return RunningModel(patcher.model, unwrapped(patcher.get_model_object("diffusion_model")),
                        patcher.get_model_object("model_sampling"),
                        patcher.get_model_object("latent_format").spacial_downscale_ratio)


def loaded_model_of(base_model) -> RunningModel:
    """The RunningModel of a BaseModel that ComfyUI has loaded, and patched where its ModelPatcher says so."""
    return RunningModel(base_model, unwrapped(base_model.diffusion_model), base_model.model_sampling,
                        base_model.latent_format.spacial_downscale_ratio)


@dataclass(frozen=True)
class Resolved:
    """Settings of a control, resolved for the model that runs.

    Attributes:
        family: the file's family.
        place, place_name: the Place at which control enters, and its name.
        gains: multipliers of the positive and of the other guidance halves.
        strength_at: noise level -> factor of the gains, 0 outside of the steps in which control acts.
        window_reference: the first frame of every context window is controlled by the first image.
        sampling, ratio: those of the RunningModel.
    """

    family: Family
    place: Place
    place_name: str
    gains: tuple[float, float]
    strength_at: StrengthOverTime
    window_reference: bool
    sampling: object
    ratio: int


def base_of_model(model: RunningModel) -> str:
    """The base (a key of ``BASES``) of a MODEL. ValueError: it has none."""
    base = base_of(model.base_model, model.denoiser)
    if base is not None:
        return base

    kind, why = kind_of(model.base_model, model.denoiser), no_way_into(model.denoiser)
    if why is not None:
        raise ValueError(f"model: control has no way into the connected MODEL, which is {kind}: {why}.")
    raise ValueError(f"model: the connected MODEL is {kind}, which is not supported yet; connect one of "
                     f"{listed(base.title for base in BASES.values())}.")


def computes_in_few_bits(model: RunningModel) -> bool:
    """Whether quantised layers of a MODEL round what they are given as well, which FEW_BITS is about."""
    return any(getattr(layer, "layout_type", None) and not layer._full_precision_mm
               for layer in model.denoiser.modules())


def family_of(model: RunningModel, controlnext: ControlNeXt) -> Family:
    """The file's family for this MODEL. ValueError: a MODEL of no base, or of another one."""
    return family_for(controlnext.loaded.checkpoint.layout, controlnext.variant, base_of_model(model))


def resolve(model: RunningModel, settings: Settings) -> Resolved:
    """Resolve settings for a MODEL.

    Raises:
        ValueError: the MODEL is of another base, or has no such place, or one of another width.
    """
    controlnext = settings.controlnext
    family = family_of(model, controlnext)
    trained_at = controlnext.place_name or family.place_name
    place_name = trained_at if settings.inject_at == "auto" else settings.inject_at
    place = _place(model, controlnext, place_name)

    off = settings.mask is not None and not settings.mask.any()
    strength = 0.0 if off else settings.strength
    positive, negative = (strength * gain for gain in family.gains(controlnext.loaded.checkpoint.scale))
    other = {"auto": negative, "both": positive, "positive": 0.0}[settings.apply_to]
    window_reference = {"auto": family.window_reference, "on": True, "off": False}[settings.window_reference]
    strength_at = StrengthOverTime(model.sampling, settings.start_percent, settings.end_percent,
                                   settings.curve, settings.keyframes)
    return Resolved(family, place, place_name, (positive, other), strength_at, window_reference, model.sampling,
                    model.ratio)


def _place(model: RunningModel, controlnext: ControlNeXt, name: str) -> Place:
    """The named place of this MODEL. ValueError: it has no such place, or one of another width; says which fit."""
    places = places_of(model.denoiser)
    channels = controlnext.loaded.checkpoint.module.out_channels
    fitting = [other for other, place in places.items() if place.channels == channels]
    if name in fitting:
        return places[name]

    found = f"is {places[name].channels} channels wide there" if name in places else "has no such place"
    advice = (f"set inject_at to {either(fitting)}" if fitting
              else "none of its places fits, so choose a ControlNeXt file made for this MODEL")
    raise ValueError(f"inject_at: {quoted(controlnext.name)} gives {channels} channels and should enter at "
                     f"{quoted(name)}, but the connected MODEL {found}; {advice}.")
