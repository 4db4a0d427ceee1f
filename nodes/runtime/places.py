"""The places at which control can enter a denoiser of ComfyUI, read off the model's own structure."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

import comfy.model_base
import comfy.model_patcher
from comfy.ldm.anima.model import Anima
from comfy.ldm.aura.mmdit import MMDiT
from comfy.ldm.chroma.model import Chroma
from comfy.ldm.flux.model import Flux
from comfy.ldm.hunyuan_video.model import HunyuanVideo
from comfy.ldm.kandinsky5.model import Kandinsky5
from comfy.ldm.lightricks.av_model import LTXAVModel
from comfy.ldm.lightricks.model import LTXVModel
from comfy.ldm.lumina.model import NextDiT
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, UNetModel
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.ldm.wan.model import WanModel

INPUT_SLOT = "input_block_patch_after_skip"
# ComfyUI before 0.18 and packs with a forward of their own have no patch after the middle block; the first output block
# gets the same features next
NEXT_SLOT, NEXT_BLOCK = "output_block_patch", ("output", 0)
MIDDLE_SLOT, MIDDLE_BLOCK = (
    ("middle_block_after_patch", ("middle", 0))
    if hasattr(comfy.model_patcher.ModelPatcher, "set_model_middle_block_after_patch")
    else (NEXT_SLOT, NEXT_BLOCK)
)
TOKEN_SLOT = "controlnext_tokens"  # only of this pack: ComfyUI looks after what it holds, and a forward puts it to use


POST_INPUT = "post_input"  # ComfyUI's own, behind the patch embedding, for a transformer's first block


def _patched_behind_input(module: str, name: str) -> type | None:
    """A class of ComfyUI's transformers, None in an older version that lacks it, or in which it calls no POST_INPUT."""
    try:
        kind = getattr(importlib.import_module(f"comfy.ldm.{module}"), name)
    except ModuleNotFoundError:
        return None
    return kind if POST_INPUT in kind._forward.__code__.co_consts else None


@dataclass(frozen=True)
class Transformer:
    """What there is to know of a class of ComfyUI's transformers, whose blocks ComfyUI calls ``double_block``.

    ComfyUI's classes derived from it have other tokens, and no row; a pack's derived class is what it derives from.

    Attributes:
        bases: {ComfyUI's class of the model around it: base}, the first one that fits speaks.
        width: attribute, or one of an attribute's, with the width of a token.
        blocks: attribute with the blocks.
        others: attributes with further blocks, where no control enters.
        refiner: attribute with the blocks before them that see only the picture, in a transformer whose blocks cannot
            be replaced: control enters after the last of these, and after a block.
        closed: its blocks can neither be replaced nor patched: control enters before the first one alone.
        patch: attribute like ``width``, with the latent pixels that a token stands for, or their last one.
        fill: of ``Place``, for one of this class.
        images: of ``Place``.
        adds_in_place: its blocks do, to what gradients need.
        writes_over: its blocks do, over what they are given and what their norms took, which gradients need.
        fused: its blocks call kernels of ComfyUI's that pass no gradients.
    """

    bases: dict[type, str]
    width: str
    blocks: str
    others: tuple[str, ...] = ()
    refiner: str | None = None
    closed: bool = False
    patch: str = "patch_size"
    fill: Callable[[object], int | None] = lambda transformer: None
    images: int = 1
    adds_in_place: bool = False
    writes_over: bool = False
    fused: bool = False


# {ComfyUI's class of the model around it: (base, width of its context)}, the first one that fits speaks
UNET_BASES = {comfy.model_base.SVD_img2vid: ("svd", 1024), comfy.model_base.SDXL: ("sdxl", 2048),
              comfy.model_base.BaseModel: ("sd15", 768)}
# {class of ComfyUI's model config: name} of UNets that are built like those, but compute with other features
LOOK_ALIKES = {"SD20": "SD2", "SD21UnclipL": "SD2.1 unCLIP", "SD21UnclipH": "SD2.1 unCLIP", "LotusD": "Lotus",
               "SD_X4Upscaler": "SD x4 upscaler", "Stable_Zero123": "Stable Zero123", "SDXLRefiner": "SDXL refiner",
               "SSD1B": "SSD-1B", "Segmind_Vega": "Segmind Vega", "KOALA_700M": "KOALA", "KOALA_1B": "KOALA",
               "SV3D_u": "SV3D", "SV3D_p": "SV3D"}
TRANSFORMERS = {
    OpenAISignatureMMDITWrapper: Transformer({comfy.model_base.SD3: "sd3"}, "hidden_size", "joint_blocks"),
    Flux: Transformer({comfy.model_base.Flux2: "flux2", comfy.model_base.Flux: "flux"}, "hidden_size", "double_blocks",
                      ("single_blocks",), adds_in_place=True),
    Chroma: Transformer({comfy.model_base.Chroma: "chroma"}, "hidden_size", "double_blocks", ("single_blocks",),
                        adds_in_place=True),
    QwenImageTransformer2DModel: Transformer({comfy.model_base.QwenImage: "qwen_image"}, "inner_dim",
                                             "transformer_blocks"),
    NextDiT: Transformer({comfy.model_base.Lumina2: "z_image"}, "dim", "layers", ("context_refiner",), "noise_refiner",
                         fill=lambda transformer: transformer.pad_tokens_multiple or 1),
    # tokens of a reference picture stand before the video's in a model that has a layer for it
    WanModel: Transformer({comfy.model_base.WAN21: "wan"}, "dim", "blocks",
                          fill=lambda transformer: None if transformer.ref_conv is None else 1, images=4),
    HunyuanVideo: Transformer({comfy.model_base.HunyuanVideo15: "hunyuan_video15"}, "hidden_size", "double_blocks",
                              ("single_blocks",), images=4, adds_in_place=True),
    LTXVModel: Transformer({comfy.model_base.LTXV: "ltxv"}, "inner_dim", "transformer_blocks",
                           patch="patchifier.patch_size", images=8, adds_in_place=True, writes_over=True),
    LTXAVModel: Transformer({comfy.model_base.LTXAV: "ltx2"}, "inner_dim", "transformer_blocks",
                            patch="patchifier.patch_size", images=8, writes_over=True),
    _patched_behind_input("krea2.model", "SingleStreamDiT"): Transformer(
        {getattr(comfy.model_base, "Krea2", None): "krea2"}, "first.out_features", "blocks", closed=True,
        patch="patch"),
    _patched_behind_input("anima.model", "Anima"): Transformer(
        {comfy.model_base.Anima: "anima"}, "model_channels", "blocks", closed=True, patch="patch_spatial", images=4,
        fused=True),
    MMDiT: Transformer({comfy.model_base.AuraFlow: "auraflow"}, "init_x_linear.out_features", "double_layers",
                       ("single_layers",)),
}
TRANSFORMERS.pop(None, None)  # those that this version of ComfyUI does not have so
# {class: why control cannot enter it} of transformers that have no row
NO_WAY_INTO = {
    Anima: "this version of ComfyUI calls no patch before its blocks; update ComfyUI or connect another MODEL",
    # they are called by names that their parameters do not have
    Kandinsky5: "ComfyUI cannot call its blocks where they are replaced; connect another MODEL",
}
AFTER_SLOTS = ("noise_refiner", "double_block")  # ComfyUI's own, after a block
# what nodes offer: of a transformer the first third of the longest, control that enters later has little left to steer
PLACES = ("conv_in", "down_0", "down_1", "down_2", "before_middle", "middle",
          "tokens", *(f"block_{index}" for index in range(12)))


@dataclass(frozen=True)
class Place:
    """One point of a denoiser: the slot and block of the patch that reaches it, its width, the latent's halvings there.

    In ``TOKEN_SLOT`` and ``POST_INPUT`` it is the point before ``block``, in ``AFTER_SLOTS`` the one after it. There
    the picture is tokens row by row, the first ones of all or, with ``fill``, the last ones, filled up to a multiple of
    it.
    A latent frame of a video stands for ``images`` control images, the first one of all for one.
    """

    slot: str
    block: tuple[str, int]
    channels: int
    halvings: int
    fill: int | None = None
    images: int = 1


def unwrapped(denoiser):
    """The denoiser itself, where torch.compile stands before it."""
    return getattr(denoiser, "_orig_mod", denoiser)


def _row(denoiser) -> Transformer | None:
    """The row of a transformer's class, which is the nearest one of ComfyUI's own."""
    own = (kind for kind in type(denoiser).__mro__ if kind.__module__.startswith("comfy."))
    return TRANSFORMERS.get(next(own, None))


def base_of(base_model, denoiser) -> str | None:
    """The base (a key of ``BASES``) of a BaseModel around this denoiser, None for another one."""
    config = base_model.model_config
    if isinstance(denoiser, UNetModel):
        width = None if type(config).__name__ in LOOK_ALIKES else config.unet_config.get("context_dim")
        bases = {kind: base for kind, (base, context) in UNET_BASES.items() if context == width}
    else:
        row = _row(denoiser)
        bases = row.bases if row else {}
    return next((base for kind, base in bases.items() if isinstance(base_model, kind)), None)


def kind_of(base_model, denoiser) -> str:
    """The name of a MODEL that has no base."""
    config = type(base_model.model_config).__name__
    if config in LOOK_ALIKES or not isinstance(denoiser, UNetModel):
        return LOOK_ALIKES.get(config, config)
    return f"{config} with a context of {base_model.model_config.unet_config.get('context_dim')}"


def no_way_into(denoiser) -> str | None:
    """Why control cannot enter a denoiser of no base, None where there is no more to say."""
    return next((why for kind, why in NO_WAY_INTO.items() if isinstance(denoiser, kind)), None)


def blocks_of(denoiser) -> list:
    """The layers of a denoiser that take most of a training's memory."""
    if isinstance(denoiser, UNetModel):
        return [layer for layer in denoiser.modules() if isinstance(layer, (ResBlock, SpatialTransformer))]
    row = _row(denoiser)
    lists = [getattr(denoiser, name) for name in (row.blocks, row.refiner, *row.others) if name]
    return [block for blocks in lists for block in blocks]


def adds_in_place(denoiser) -> bool:
    """Whether a denoiser's blocks add in place to what gradients need."""
    row = _row(denoiser)
    return row is not None and row.adds_in_place


def writes_over(denoiser) -> bool:
    """Whether a denoiser's blocks write over what they are given, and what their norms took."""
    row = _row(denoiser)
    return row is not None and row.writes_over


def is_fused(denoiser) -> bool:
    """Whether a denoiser's blocks call kernels of ComfyUI's that pass no gradients."""
    row = _row(denoiser)
    return row is not None and row.fused


def images_a_frame(denoiser) -> int:
    """How many control images a latent frame of a video stands for, except the first one of all."""
    row = _row(denoiser)
    return 1 if row is None else row.images


def places_of(denoiser) -> dict[str, Place]:
    """{name: Place} of ComfyUI's UNetModel or one of TRANSFORMERS."""
    return _unet_places(denoiser) if isinstance(denoiser, UNetModel) else _token_places(denoiser)


def _unet_places(unet) -> dict[str, Place]:
    """With any number of blocks: ``down_i`` follows its i-th Downsample."""
    places = {}
    halvings = 0
    for index, block in enumerate(unet.input_blocks):
        channels = next(layer.out_channels for layer in reversed(block) if hasattr(layer, "out_channels"))
        if index == 0:
            places["conv_in"] = Place(INPUT_SLOT, ("input", index), channels, halvings)
        if any(isinstance(layer, Downsample) for layer in block):
            halvings += 1
            places[f"down_{halvings - 1}"] = Place(INPUT_SLOT, ("input", index), channels, halvings)
    places["before_middle"] = Place(INPUT_SLOT, ("input", index), channels, halvings)
    places["middle"] = Place(MIDDLE_SLOT, MIDDLE_BLOCK, channels, halvings)
    return places


def _token_places(transformer) -> dict[str, Place]:
    """``tokens`` follows the patch embedding, ``block_i`` the i-th block; each is the point before the next block.

    So a block serves one place, and nothing enters after the last, where no block would read it.
    """
    row = _row(transformer)
    patch = attrgetter(row.patch)(transformer)
    side = patch if isinstance(patch, int) else patch[-1]
    where = attrgetter(row.width)(transformer), side.bit_length() - 1, row.fill(transformer), row.images
    points = [(TOKEN_SLOT, index) for index in range(len(getattr(transformer, row.blocks)))]
    if row.refiner:
        points = [("noise_refiner", len(getattr(transformer, row.refiner)) - 1),
                  *(("double_block", index - 1) for _, index in points[1:])]
    if row.closed:
        points = [(POST_INPUT, 0)]
    names = ("tokens", *(f"block_{index}" for index in range(len(points) - 1)))
    return {name: Place(slot, ("double_block", index), *where)
            for name, (slot, index) in zip(names, points, strict=True)}
