"""Puts the demonstration's trained weights where ComfyUI lists them.

    python provide.py COMFYUI MODELS

writes what FILES names into ComfyUI's models folder MODELS, run by an interpreter that has ComfyUI's packages. In the
repository the checkpoint has no text encoder (246 MB that text.py makes from a seed) and a VAE as narrow as it was
trained; here both are put in, so that the stock loader takes it for Stable Diffusion 1.5.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
WEIGHTS = FOLDER / "weights"
CHECKPOINT = "drawings.safetensors"
CANNY, CANNY_UNET = "drawings_canny_controlnet.safetensors", "drawings_canny_unet.safetensors"
MASK, MASK_UNET = "drawings_mask_controlnet.safetensors", "drawings_mask_unet.safetensors"
LORA = "drawings_style_lora.safetensors"
FILES = {CANNY: "controlnext", CANNY_UNET: "controlnext", MASK: "controlnext", MASK_UNET: "controlnext",
         LORA: "loras", CHECKPOINT: "checkpoints"}  # the checkpoint last: when it is whole, so are the others
UNET, VAE = "model.diffusion_model.", "first_stage_model."


def source(name: str) -> Path:
    """What one of FILES is made from."""
    return WEIGHTS / name.removeprefix("drawings_")


def provide(comfyui: Path, models: Path) -> None:
    """Make the files, in a process of its own, unless ComfyUI's models folder `models` holds them newer than this."""
    sources = [*map(source, FILES), Path(__file__), FOLDER / "text.py", FOLDER / "autoencoder.py"]
    newest = max(file.stat().st_mtime for file in sources)
    files = [models / folder / name for name, folder in FILES.items()]
    if not all(file.is_file() and file.stat().st_mtime > newest for file in files):
        subprocess.run([sys.executable, __file__, comfyui, models], check=True)


def make(comfyui: Path, models: Path) -> None:
    """Write the files into ComfyUI's models folder `models`."""
    sys.path += [str(FOLDER.parent / "scripts"), str(FOLDER.parent)]  # last, for ComfyUI has a module `nodes` too
    import stand_in
    stand_in.load_comfyui(comfyui)
    for name, folder in FILES.items():
        place = models / folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if name == CHECKPOINT:
            stand_in.save(checkpoint(), place)
        else:
            shutil.copyfile(source(name), place)


def checkpoint(file: Path = WEIGHTS / CHECKPOINT) -> dict:
    """The tensors of the checkpoint, float16, by the names of an SD1.5 checkpoint."""
    from safetensors.torch import load_file

    from demo_model.autoencoder import widened
    from demo_model.text import text_encoder_weights
    tensors = load_file(file)
    vae = {VAE + name: tensor for name, tensor in widened(part(tensors, VAE)).items()}
    return tensors | vae | text_encoder_weights()


def part(tensors: dict, prefix: str) -> dict:
    """The tensors whose names begin with `prefix`, named without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]))
