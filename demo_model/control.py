"""The demonstration's controls, trained as a user of the pack trains one: with Train ControlNeXt and ComfyUI's nodes.

Each is a narrow ControlNeXt, and a few of the denoiser's weights. The UNet's enters after the first convolution, as an
SDXL one does, since this UNet has one level and so lacks SD1.5's own place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from controlnext_core.families import FAMILIES
from controlnext_core.module import new_module
from demo_model.agreement import drawn_region
from demo_model.bases import Base
from demo_model.drawings import Drawings, to_drawings
from demo_model.samples import Varied

WIDTHS = {"stem_0": 32, "stem_1": 32, "width_0": 64, "width_1": 64, "width_2": 128}
NARROW = "narrow.safetensors"
# share of the captions that are another drawing's: edges, which tell more than a caption, are to hold against it
SWAPPED_CAPTIONS = {"canny": 0.3, "mask": 0.0, "super_resolution": 0.3}
SETTINGS = {
    "learning_rate": 1e-3, "unet_learning_rate": 3e-4, "trainable": "module and UNet weights",
    "scale_learning_rate": 0.0,  # these controls are older than it
    "training_dtype": "bf16" if torch.cuda.is_available() else "fp32", "gradient_checkpointing": False,
    "caption_dropout": 0.3,  # more than usual: control is to work without a prompt as well
    "warmup_steps": 100, "ema": 0.995, "seed": 0, "save_every": 250, "preview_every": 0,
}
BASE_SETTINGS = {
    "sd15": {
        # the reference's, and the convolution that meets the features, since so small a UNet has one chance
        "unet_pattern": r"to_out|down_blocks.*conv1",
        "inject_at": "conv_in",
        "min_snr_gamma": 0.1,  # low, for control is about where things are, which is fixed while noise prevails
    },
    "sd3": {
        # a token stands for 16 x 16 pixels, whose detail only the feed-forward layers work out of what control brings
        "unet_pattern": r"to_out|\.ff\.",
        "inject_at": "tokens",
        "min_snr_gamma": 0.0,
        "ema": 0.998,
    },
}
BASE_SETTINGS["sd3_192"] = BASE_SETTINGS["sd3"] | {"ema": 0.995}
# all of the picture's stream, whose colours are to stay those of the small picture
PICTURES_STREAM = r"to_out|to_[qkv]|norm1\.|\.ff\.|^proj_out|pos_embed\.proj|norm_out"
KIND_SETTINGS = {
    ("sd3", "super_resolution"): {"unet_pattern": PICTURES_STREAM,
                                  "ema": 0.999},  # the longer the training, the longer the average
    ("sd3_192", "super_resolution"): {"unet_pattern": PICTURES_STREAM},
    ("sd3_192", "mask"): {"unet_pattern": "to_out"},  # a small file, since a region has no detail
}


def dataset(run: Callable, drawings: Drawings, base: Base, kind: str, file: Path) -> dict:
    """Inputs of Train ControlNeXt: the drawings that training may see in their variations, captions, control images.

    Args:
        run: executes a node and returns its output, or all of them where it has several.
        file: keeps latents and encoded captions, for they take minutes.
    """
    model, clip, vae = run("CheckpointLoaderSimple", ckpt_name=base.checkpoint)
    varied = Varied(drawings, base.variations, "cuda" if torch.cuda.is_available() else "cpu")
    shown = [drawings.captions[index] for index in drawings.training]
    texts, latents, images = [*dict.fromkeys(shown), ""], [], []
    for variations in varied.some(drawings.training):
        pictures = variations.flatten(0, 1).movedim(1, -1).cpu()
        images.append(control_images(run, pictures, kind))
        if not file.exists():
            latents.append(run("VAEEncode", pixels=pictures, vae=vae))
    if not file.exists():
        torch.save((latents, [run("CLIPTextEncode", clip=clip, text=text) for text in texts]), file)
    latents, encoded = torch.load(file, weights_only=True)
    caption_of = dict(zip(texts, encoded, strict=True))

    generator, conditioning, each = np.random.default_rng(0), [], sum(base.variations)
    for own in range(len(shown)):
        swapped = generator.random(each) < SWAPPED_CAPTIONS[kind]
        others = generator.integers(len(shown), size=each)
        conditioning += [caption_of[shown[row]] for row in np.where(swapped, others, own)]

    return {"model": [model], "latents": latents, "conditioning": conditioning,
            "empty_conditioning": [caption_of[""]], "images": images}


def control_images(run: Callable, pictures: torch.Tensor, kind: str) -> torch.Tensor:
    """The control image of each picture of an IMAGE; for super-resolution the node itself makes it of the picture."""
    if kind == "super_resolution":
        return pictures
    if kind == "canny":
        edges = run("ControlNeXtCanny", image=pictures, threshold="auto", low_threshold=100, high_threshold=200)
        return edges[..., :1].clone()  # gray, for they lie in memory together
    with ThreadPoolExecutor() as pool:
        regions = np.stack(list(pool.map(drawn_region, to_drawings(pictures.movedim(-1, 1)))))
    return torch.from_numpy(regions).float()[..., None]


def train(run: Callable, folder: Path, drawings: Drawings, base: Base, kind: str, steps: int, encoded: Path,
          start: Mapping[str, torch.Tensor] | None = None, **changes) -> Path:
    """Train a control, from where an earlier call was stopped; returns the folder that Save ControlNeXt Model wrote.

    Args:
        folder: ComfyUI's base directory.
        encoded: keeps latents and encoded captions of this base.
        start: the state dict of the module to begin with, a new one of ``WIDTHS`` if None.
        changes: inputs of Train ControlNeXt that are to be other than the settings here.
    """
    output, name = folder / "output", f"{base.name}_{kind}"
    start = start or new_module(FAMILIES[base.family], **WIDTHS, out=base.width).state_dict()
    save_file(start, folder / "models" / "controlnext" / NARROW)

    settings = SETTINGS | BASE_SETTINGS[base.name] | KIND_SETTINGS.get((base.name, kind), {}) | {
        "steps": steps, "batch_size": base.batches[kind], "filename_prefix": name,
        "super_resolution": kind == "super_resolution"} | changes
    kept = output.glob(f"controlnext_training/{name}_*.pt")
    if latest := max(kept, key=lambda file: file.stat().st_mtime, default=None):
        settings["resume_from"] = latest.name

    settings["controlnext"] = run("ControlNeXtLoader", controlnext_name=NARROW, variant=base.family)
    controlnext, *_ = run("ControlNeXtTrain", **dataset(run, drawings, base, kind, encoded),
                          **{name: [value] for name, value in settings.items()})
    run("ControlNeXtSave", controlnext=controlnext, filename_prefix=f"controlnext/{name}")
    return max(output.glob(f"controlnext/{name}_*"))
