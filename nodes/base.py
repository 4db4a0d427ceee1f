"""What a ControlNeXt is for a connected MODEL: its family, place and gains, or one sentence on why it does not fit."""

import comfy.model_base
from comfy.ldm.chroma.model import Chroma
from comfy.ldm.flux.model import Flux
from comfy.ldm.lumina.model import NextDiT
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.ldm.wan.model import WanModel
from comfy_api.latest import io

from ..controlnext_core.families import BASE_NAMES, Family, either, listed, resolve
from .model import ControlNeXt
from .places import PLACES, Place, places_of

# ComfyUI's classes of the denoiser and of the model around it -> base; the first row that fits speaks
BASES = (
    (UNetModel, comfy.model_base.SVD_img2vid, "svd"),
    (UNetModel, comfy.model_base.SDXL, "sdxl"),
    (UNetModel, comfy.model_base.BaseModel, "sd15"),
    (OpenAISignatureMMDITWrapper, comfy.model_base.SD3, "sd3"),
    (Flux, comfy.model_base.Flux2, "flux2"),
    (Flux, comfy.model_base.Flux, "flux"),
    (Chroma, comfy.model_base.Chroma, "chroma"),
    (QwenImageTransformer2DModel, comfy.model_base.QwenImage, "qwen_image"),
    (NextDiT, comfy.model_base.Lumina2, "z_image"),
    (WanModel, comfy.model_base.WAN21, "wan"),
)

WHERE = ("Where control enters the UNet, or the tokens of a transformer such as SD3: at once or after a block. auto is "
         "where the model was trained to enter.")

FEW_BITS = ("The connected MODEL multiplies in 8 bits or fewer, so what control changes is off by some percent, as all "
            "that it computes; connect the same model in fp16 or GGUF to have it exact.")


def inject_at_input(tooltip: str = WHERE) -> io.Input:
    """What ``settle`` takes as ``inject_at``."""
    return io.Combo.Input("inject_at", options=["auto", *PLACES], default="auto", optional=True, advanced=True,
                          tooltip=tooltip)


def apply_to_input(whose: str = "") -> io.Input:
    """What ``settle`` takes as ``apply_to``."""
    return io.Combo.Input(
        "apply_to", options=["auto", "both", "positive"], default="auto", optional=True, advanced=True,
        tooltip=f"Which guidance halves are controlled{whose}. auto is how the model was trained; positive leaves the "
                "negative half alone, which makes control stronger.")


def base_of_model(base_model) -> str:
    """The base (a key of ``BASE_NAMES``) of a MODEL. ValueError: it has none."""
    denoiser = base_model.diffusion_model
    kind = UNetModel if isinstance(denoiser, UNetModel) else type(denoiser)
    for known, model, base in BASES:
        if kind is known and isinstance(base_model, model):
            return base
    raise ValueError(f"model: ControlNeXt steers {listed(BASE_NAMES)} models; the connected MODEL is a "
                     f"{type(base_model).__name__}, which is not supported yet.")


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
