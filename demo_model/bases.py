"""The demonstration's bases: the one table that says how the SD3 differs from the one that is an SD1.5 to ComfyUI."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Base:
    """A checkpoint of our own, and what ComfyUI takes it for.

    Attributes:
        name: the base's among the families' bases; its denoiser is the one of this name in make.py.
        checkpoint: its file.
        prefix: the beginning of the names of its controls' files.
        channels: number of its latents' channels.
        width: its denoiser's, in channels.
        scale, shift: its denoiser gets (latents - shift) * scale, as ComfyUI's latent format of the base has it.
        text: prefix of the text encoder's tensors in a checkpoint.
        clip: ComfyUI's type of the text encoder.
        pooled_words: the text encoder's last layer puts the words into the pooled text, too.
        full_widths: {tensor: columns that ComfyUI wants of it}; the file has only those that ever meet a number.
        start: the base whose VAE its own begins as, "" for none.
        sampler: inputs of KSampler.
        steps: {stage: steps of its training}.
    """

    name: str
    checkpoint: str
    prefix: str
    channels: int
    width: int
    scale: float
    shift: float
    text: str
    clip: str
    pooled_words: bool
    full_widths: dict[str, int]
    start: str
    sampler: dict
    steps: dict[str, int]


BASES = {
    base.name: base
    for base in (
        Base(name="sd15", checkpoint="drawings.safetensors", prefix="drawings_", channels=4, width=320, scale=0.18215,
             shift=0.0, text="cond_stage_model.transformer.", clip="STABLE_DIFFUSION", pooled_words=False,
             full_widths={}, start="",
             sampler={"steps": 12, "sampler_name": "dpmpp_2m", "scheduler": "karras"},
             steps={"autoencoder": 4000, "decoder": 3000, "denoiser": 12000, "canny": 3500, "mask": 900}),
        Base(name="sd3", checkpoint="drawings_sd3.safetensors", prefix="drawings_sd3_", channels=16, width=256,
             scale=1.5305, shift=0.0609, text="text_encoders.clip_l.transformer.", clip="SD3", pooled_words=True,
             full_widths={"context_embedder.weight": 4096, "y_embedder.mlp.0.weight": 2048}, start="sd15",
             sampler={"steps": 16, "sampler_name": "euler", "scheduler": "simple"},
             steps={"autoencoder": 300, "decoder": 1000, "denoiser": 5500, "canny": 2000, "super_resolution": 16000}),
    )
}
