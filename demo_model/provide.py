"""Puts the demonstration's trained weights where ComfyUI lists them.

    python -m demo_model.provide COMFYUI MODELS

writes what FILES names into ComfyUI's models folder MODELS, run by an interpreter that has ComfyUI's packages. In the
repository a checkpoint has no text encoder (246 MB that text.py makes from a seed) and a VAE as narrow as it was
trained; here both are put in, so that the stock loader takes it for what it is in the table of bases.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from demo_model.bases import BASES, WEIGHTS, Base

FOLDER = WEIGHTS.parent
CANNY, CANNY_UNET = "drawings_canny_controlnet.safetensors", "drawings_canny_unet.safetensors"
MASK, MASK_UNET = "drawings_mask_controlnet.safetensors", "drawings_mask_unet.safetensors"
LORA = "drawings_style_lora.safetensors"
SD3_CANNY, SD3_CANNY_UNET = "drawings_sd3_canny_controlnet.safetensors", "drawings_sd3_canny_unet.safetensors"
SD3_RESTORING, SD3_RESTORING_UNET = ("drawings_sd3_super_resolution_controlnet.safetensors",
                                     "drawings_sd3_super_resolution_unet.safetensors")


def source(name: str) -> Path:
    """The file that one of FILES is made from."""
    return WEIGHTS / name.removeprefix("drawings_")


MADE = [base for base in BASES.values() if source(base.checkpoint).is_file()]
FILES = {**dict.fromkeys((CANNY, CANNY_UNET, MASK, MASK_UNET, SD3_CANNY, SD3_CANNY_UNET, SD3_RESTORING,
                          SD3_RESTORING_UNET), "controlnext"),
         LORA: "loras",
         **{base.checkpoint: "checkpoints" for base in MADE}}
UNET, VAE = "model.diffusion_model.", "first_stage_model."
SCALE = ".row_scale"  # ends the name of the scale of each row of a matrix in 8 bits


def provide(comfyui: Path, models: Path) -> None:
    """Make the files, in a process of its own, unless ComfyUI's models folder `models` holds them newer than this."""
    sources = [*map(source, FILES), *map(FOLDER.joinpath, ("provide.py", "text.py", "autoencoder.py", "bases.py"))]
    newest = max(file.stat().st_mtime for file in sources)
    files = [models / folder / name for name, folder in FILES.items()]
    if not all(file.is_file() and file.stat().st_mtime > newest for file in files):
        command = [sys.executable, "-m", "demo_model.provide", comfyui.absolute(), models.absolute()]
        subprocess.run(command, cwd=FOLDER.parent, check=True)


def make(comfyui: Path, models: Path) -> None:
    """Write the files into ComfyUI's models folder `models`."""
    sys.path.append(str(FOLDER.parent / "scripts"))
    import in_process
    import stand_in
    in_process.load_comfyui(comfyui, "--cpu")
    checkpoints = {base.checkpoint: base for base in MADE}
    for name, folder in FILES.items():
        place = models / folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if name in checkpoints:
            stand_in.save(checkpoint(checkpoints[name]), place)
        else:
            shutil.copyfile(source(name), place)


def checkpoint(base: Base, weights: Path = WEIGHTS) -> dict:
    """The tensors of a base's checkpoint, float16, by the names that ComfyUI knows.

    Args:
        weights: the folder with what was trained.
    """
    import torch.nn.functional as F
    from safetensors.torch import load_file

    from demo_model.autoencoder import widened
    from demo_model.text import text_encoder_weights
    tensors = out_of_eight_bits(load_file(weights / source(base.checkpoint).name))
    vae = {VAE + name: tensor for name, tensor in widened(part(tensors, VAE)).items()}
    full = {UNET + name: F.pad(tensors[UNET + name], (0, columns - tensors[UNET + name].shape[1]))
            for name, columns in base.full_widths.items()}
    return tensors | full | vae | text_encoder_weights(base)


def in_eight_bits(tensors: dict) -> dict:
    """The tensors, matrices as int8 beside a scale for each row: a third of the error that scaled fp8 would have."""
    stored = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            scale = (tensor.abs().amax(dim=1, keepdim=True) / 127).clamp(min=2 ** -14).half()
            stored |= {name: (tensor / scale).round().char(), name + SCALE: scale}
    return stored


def out_of_eight_bits(stored: dict) -> dict:
    """The tensors that ``in_eight_bits`` stored, matrices in float16; others as they are."""
    return {name: tensor * stored[name + SCALE] if name + SCALE in stored else tensor
            for name, tensor in stored.items() if not name.endswith(SCALE)}


def part(tensors: dict, prefix: str) -> dict:
    """The tensors whose names begin with `prefix`, named without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]))
