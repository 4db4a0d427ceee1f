"""What a ControlNeXt is for a connected MODEL: its family, place and gains, or one sentence on why it does not fit."""

from ...controlnext_core.families import BASE_NAMES, Family, either, listed, resolve
from .loaded import ControlNeXt
from .places import Place, base_of, places_of

FEW_BITS = ("The connected MODEL multiplies in 8 bits or fewer, so what control changes is off by some percent, as all "
            "that it computes; connect the same model in fp16 or GGUF to have it exact.")


def base_of_model(base_model) -> str:
    """The base (a key of ``BASE_NAMES``) of a MODEL. ValueError: it has none."""
    base = base_of(base_model)
    if base is None:
        raise ValueError(f"model: ControlNeXt steers {listed(BASE_NAMES)} models; the connected MODEL is a "
                         f"{type(base_model).__name__}, which is not supported yet.")
    return base


def computes_in_few_bits(base_model) -> bool:
    """Whether quantised layers of a MODEL round what they are given as well, which FEW_BITS is about."""
    return any(getattr(layer, "layout_type", None) and not layer._full_precision_mm
               for layer in base_model.diffusion_model.modules())


def family_of(base_model, controlnext: ControlNeXt) -> Family:
    """The file's family for this MODEL. ValueError: a MODEL of no base, or of another one."""
    return resolve(controlnext.loaded.checkpoint.layout, controlnext.variant, base_of_model(base_model))


def settle(base_model, controlnext: ControlNeXt, inject_at: str,
           apply_to: str) -> tuple[Family, Place, tuple[float, float]]:
    """(family, place, gains of the positive and the other guidance halves) that ``auto`` or the user chose.

    Raises:
        ValueError: the MODEL is of another base, or has no such place, or one of another width.
    """
    family = family_of(base_model, controlnext)
    trained_at = controlnext.place or family.place
    place = _place(base_model, controlnext, trained_at if inject_at == "auto" else inject_at)
    positive, negative = family.gains(controlnext.loaded.checkpoint.scale)
    return family, place, (positive, {"auto": negative, "both": positive, "positive": 0.0}[apply_to])


def _place(base_model, controlnext: ControlNeXt, name: str) -> Place:
    """The named place of this MODEL. ValueError: it has no such place, or one of another width; says which fit."""
    places = places_of(base_model.diffusion_model)
    channels = controlnext.loaded.checkpoint.module.out_channels
    fitting = [other for other, place in places.items() if place.channels == channels]
    if name in fitting:
        return places[name]
    found = f"is {places[name].channels} channels wide there" if name in places else "has no such place"
    advice = (f"set inject_at to {either(fitting)}" if fitting
              else "none of its places fits, so choose a ControlNeXt file made for this MODEL")
    raise ValueError(f"inject_at: {controlnext.name} gives {channels} channels and should enter at {name}, but the "
                     f"connected MODEL {found}; {advice}.")
