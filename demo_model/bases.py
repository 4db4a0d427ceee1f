"""The demonstration's bases: the one table that says how they differ from each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

WEIGHTS = Path(__file__).resolve().parent / "weights"  # what is trained


@dataclass(frozen=True)
class Base:
    """A checkpoint of our own, and what ComfyUI takes it for.

    Attributes:
        name: its key here.
        family: the base's among the families' bases; its denoiser is the one of this name in make.py.
        data: its drawings' key in ``drawings.DATA``.
        variations: of each drawing, (upright, mirrored); mirrored ones train only controls.
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
        batches: {stage: samples of a step}.
        crop: pixels on a side of what trains its VAE.
        eight_bits: its denoiser's matrices are stored in 8 bits.
    """

    name: str
    family: str
    data: str
    variations: tuple[int, int]
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
    batches: dict[str, int]
    crop: int = 64
    eight_bits: bool = False


_SD3 = {
    "family": "sd3", "channels": 16, "scale": 1.5305, "shift": 0.0609, "text": "text_encoders.clip_l.transformer.",
    "clip": "SD3", "pooled_words": True,
    "full_widths": {"context_embedder.weight": 4096, "y_embedder.mlp.0.weight": 2048},
    "sampler": {"steps": 16, "sampler_name": "euler", "scheduler": "simple"},
}
BASES = {
    base.name: base
    for base in (
        Base(name="sd15", family="sd15", data="noto", variations=(4, 4), checkpoint="drawings.safetensors",
             prefix="drawings_", channels=4, width=320, scale=0.18215, shift=0.0,
             text="cond_stage_model.transformer.", clip="STABLE_DIFFUSION", pooled_words=False, full_widths={},
             start="", sampler={"steps": 12, "sampler_name": "dpmpp_2m", "scheduler": "karras"},
             steps={"autoencoder": 4000, "decoder": 3000, "denoiser": 12000, "canny": 3500, "mask": 900},
             batches={"autoencoder": 16, "decoder": 16, "denoiser": 16, "canny": 8, "mask": 8}),
        Base(name="sd3", data="noto", variations=(4, 4), checkpoint="drawings_sd3.safetensors",
             prefix="drawings_sd3_", width=256, start="sd15", **_SD3,
             steps={"autoencoder": 300, "decoder": 1000, "denoiser": 5500, "canny": 2000, "super_resolution": 16000},
             batches={"autoencoder": 16, "decoder": 16, "denoiser": 32, "canny": 8, "super_resolution": 8}),
        # for a GPU; not trained yet
        Base(name="sd3_192", data="sets", variations=(3, 1), checkpoint="drawings_sd3_192.safetensors",
             prefix="drawings_sd3_192_", width=320, start="", **_SD3, crop=96, eight_bits=True,
             steps={"autoencoder": 2000, "decoder": 1000, "denoiser": 3000, "canny": 1200, "mask": 300,
                    "super_resolution": 1000},
             batches={"autoencoder": 64, "decoder": 64, "denoiser": 256, "canny": 32, "mask": 32,
                      "super_resolution": 32}),
    )
}
