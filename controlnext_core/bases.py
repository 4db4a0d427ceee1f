"""The bases, the denoisers that ControlNeXt steers: one row for each, with all that the method needs to know of it.

ComfyUI's classes and names of weights have tables of their own, by the names of these rows.
"""

from collections.abc import Iterable
from dataclasses import dataclass

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.", "transformer.")  # of a denoiser's keys in a file


@dataclass(frozen=True)
class Base:
    """One kind of denoiser.

    Attributes:
        name: its key in ``BASES`` and in every other table of bases.
        title: its name as people write it.
        unet_pattern: which of its weights are trained along, as a regular expression of their diffusers names.
        marks: parts of its keys, by diffusers' and ComfyUI's names, that belong to it.
        shared: such parts that other bases have as well; they tell it where no mark belongs to one of these.
        new_variant: the family of a new control, by its name, or ``auto`` where the layout leaves no choice.
        log_sigmas: (mean, std) of the logarithm of training's noise levels; None: they are the sampling's own, evenly.
        frames_in_rows: a LATENT is one video with a frame in each row; otherwise each row is a picture or a video.
    """

    name: str
    title: str
    unet_pattern: str
    marks: tuple[str, ...]
    shared: tuple[str, ...] = ()
    new_variant: str = "auto"
    log_sigmas: tuple[float, float] | None = None
    frames_in_rows: bool = False


_SD15_MARKS = ("down_blocks.0.attentions.", "input_blocks.1.1.")
_VECTOR_MARKS = ("add_embedding.", "label_emb.")
_FLUX_SHARED = ("double_blocks.", "single_blocks.", "single_transformer_blocks.", ".attn.", ".img_mlp.")
# the first ten blocks of a large transformer: in Flux.1 these are 94 million numbers, whose training takes 1.5 GB
_FIRST_BLOCKS = r"^transformer_blocks\.\d\.attn\.to_out"
# the patterns of UNets are those of the reference, which has no transformers; theirs do the same as SD1.5's: they name
# the layers where the attention of the picture's tokens ends
BASES = {
    base.name: base
    for base in (
        Base("sd15", "SD1.5", "to_out", _SD15_MARKS),
        Base("sdxl", "SDXL", r"attn2.*to_out", (*_VECTOR_MARKS, ".transformer_blocks.1."), shared=_SD15_MARKS),
        Base("svd", "SVD", "to_out|to_v",
             ("spatial_res_block.", "temporal_res_block.", "temporal_transformer_blocks.", "time_stack.", "time_mixer.",
              "time_pos_embed."), shared=(*_SD15_MARKS, *_VECTOR_MARKS),
             new_variant="svd_padded", log_sigmas=(0.7, 1.6), frames_in_rows=True),  # as the reference's own training
        Base("sd3", "SD3", "to_out", ("joint_blocks.",), shared=(".attn.",)),
        Base("flux", "Flux.1", _FIRST_BLOCKS, ("vector_in.", "time_text_embed.guidance_embedder."),
             shared=_FLUX_SHARED),
        Base("chroma", "Chroma", _FIRST_BLOCKS, ("distilled_guidance_layer.",), shared=_FLUX_SHARED),
        Base("qwen_image", "Qwen-Image", _FIRST_BLOCKS, ("txt_norm.", ".img_mlp."), shared=(".attn.",)),
        Base("flux2", "Flux.2", _FIRST_BLOCKS, ("double_stream_modulation_img.",),
             shared=("time_text_embed.guidance_embedder.", *_FLUX_SHARED)),
        Base("z_image", "Z-Image", r"^layers\.\d\.attention\.to_out", (".attention.qkv.", ".attention.to_")),
        Base("wan", "Wan", r"^blocks\.\d\.attn1\.to_out", (".self_attn.q.", ".self_attn.o.", "condition_embedder.")),
        Base("hunyuan_video15", "HunyuanVideo 1.5", _FIRST_BLOCKS, ("cond_type_embed",), shared=_FLUX_SHARED),
        Base("ltxv", "LTX-Video", r"^transformer_blocks\.\d\.attn1\.to_out", ("caption_projection.", "patchify_proj.")),
        Base("krea2", "Krea 2", _FIRST_BLOCKS, ("txtfusion.", "text_fusion."), shared=(".attn.",)),
        Base("anima", "Anima", r"^transformer_blocks\.\d\.attn1\.to_out",
             ("adaln_modulation_self_attn.", ".norm1.linear_1.", "llm_adapter.")),
        Base("auraflow", "AuraFlow", r"^(joint_transformer_blocks\.\d|single_transformer_blocks\.[0-5])\.attn\.to_out",
             ("double_layers.", "single_layers.", "joint_transformer_blocks."),
             shared=("single_transformer_blocks.", ".attn.")),
        Base("ltx2", "LTX-2", r"^transformer_blocks\.\d\.attn1\.to_out",
             (".audio_attn", "audio_patchify_proj.", "audio_proj_in."),
             shared=("caption_projection.", "patchify_proj.")),
    )
}


def without_prefix(key: str) -> str:
    """A denoiser's key without the prefix that it may have in a file."""
    return next((key[len(prefix):] for prefix in PREFIXES if key.startswith(prefix)), key)


def bases_of(keys: Iterable[str]) -> list[str]:
    """Names of the bases that these keys can be of, none when they tell nothing.

    These are the bases that have every mark in the keys; if any of these marks belongs to one of them, that one.

    Args:
        keys: by diffusers' or ComfyUI's names, with or without prefix; of a whole checkpoint those with one count.
    """
    keys = list(keys)
    prefixed = [key for key in keys if key.startswith(PREFIXES)]
    names = [without_prefix(key) for key in prefixed or keys]

    def in_a_name(mark: str) -> bool:
        return any(mark in name for name in names)

    found = {mark for base in BASES.values() for mark in filter(in_a_name, (*base.marks, *base.shared))}
    if not found:
        return []

    fitting = [base for base in BASES.values() if found.issubset((*base.marks, *base.shared))]
    told = [base for base in fitting if found.intersection(base.marks)]
    return [base.name for base in told or fitting]
