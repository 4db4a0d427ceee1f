"""Trains a style LoRA for the demonstration's model with ComfyUI's own nodes, in a real ComfyUI server.

    python demo_model/style_lora.py

Sets up ComfyUI as the demo does, prints some of the training drawings in one ink, queues

    LoadImageTextDataSetFromFolder -> MakeTrainingDataset -> TrainLoraNode -> SaveLoRA

and writes weights/style_lora.safetensors; it needs weights/drawings.safetensors, and npm for the drawings.

Why this style: it is seen at a glance, every line stays where it was, and it needs no colours but those that the VAE,
which knows only emoji on white paper, can show; a purer blue becomes green, and coloured paper gets spots.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))
import demo  # noqa: E402
import environment  # noqa: E402

INK, PAPER = (10, 95, 130), (255, 255, 255)  # RGB
CONTRAST = 1.8  # exponent of the brightness, so that pale drawings take ink as well
DRAWINGS = 64
NAMELESS = 8  # every so manyth drawing has no caption, so that an empty prompt gets the style as well
STEPS = 1200
SETTINGS = {
    "batch_size": 1,  # in a larger batch ComfyUI 0.30 gives every picture the captions of all
    "learning_rate": 2e-3, "rank": 4, "algorithm": "LoRA", "optimizer": "AdamW", "loss_function": "MSE",
    "training_dtype": "fp32", "lora_dtype": "fp32", "gradient_checkpointing": False, "seed": 0,
    "bypass_mode": True,  # without it ComfyUI takes half as long again, for the gradients of whole weights
    "grad_accumulation_steps": 1, "checkpoint_depth": 1, "offloading": False, "quantized_backward": False,
    "bucket_mode": False, "existing_lora": "[None]",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="number of training steps (default: %(default)s)")
    return parser.parse_args()


def printed(drawings: np.ndarray) -> np.ndarray:
    """Drawings (N, H, W, 3), uint8 RGB, in INK on PAPER: the darker a pixel was, the more ink."""
    import numpy as np
    brightness = (drawings / 255 @ np.array([0.299, 0.587, 0.114])) ** CONTRAST
    share = brightness[..., None]
    return (np.array(INK) * (1 - share) + np.array(PAPER) * share).round().astype(np.uint8)


def put_dataset(folder: Path) -> None:
    """Write DRAWINGS of the drawings that training may see, printed, and beside each a text file with its name."""
    from PIL import Image

    from demo_model.drawings import load_drawings
    drawings = load_drawings(environment.cache_folder() / "demo_model")
    chosen = drawings.training[::len(drawings.training) // DRAWINGS][:DRAWINGS]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    for number, (index, drawing) in enumerate(zip(chosen, printed(drawings.pictures[chosen]), strict=True)):
        Image.fromarray(drawing).save(folder / f"{number:02}.png")
        if number % NAMELESS:
            (folder / f"{number:02}.txt").write_text(drawings.captions[index], encoding="utf-8")


def training(checkpoint: str, folder: str, steps: int, prefix: str) -> dict:
    """The graph in ComfyUI's API format; the LoRA goes to ComfyUI's output folder as `prefix`_00001_.safetensors."""
    node = demo.node
    return {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "drawings": node("LoadImageTextDataSetFromFolder", folder=folder),
        "dataset": node("MakeTrainingDataset", images=["drawings", 0], texts=["drawings", 1], vae=["checkpoint", 2],
                        clip=["checkpoint", 1]),
        # TrainLoraNode draws the LoRA's first weights from torch's own generator. A sampler of no steps seeds that.
        "seed": node("KSampler", model=["checkpoint", 0], positive=["dataset", 1], negative=["dataset", 1],
                     latent_image=["dataset", 0], seed=SETTINGS["seed"], steps=1, cfg=1.0, sampler_name="euler",
                     scheduler="normal", denoise=0.0),
        "train": node("TrainLoraNode", model=["checkpoint", 0], latents=["seed", 0], positive=["dataset", 1],
                      steps=steps, **SETTINGS),
        "save": node("SaveLoRA", lora=["train", 0], prefix=prefix),
        "loss": node("LossGraphNode", loss=["train", 1], filename_prefix=prefix),
    }


def run(options: argparse.Namespace, comfyui: Path) -> None:
    import comfy_client
    import in_process
    import stand_in
    from safetensors.torch import load_file, save_file

    from demo_model import provide
    from demo_model.bases import BASES
    base, sd15 = environment.base_directory(environment.cache_folder() / "style_lora"), BASES["sd15"]
    put_dataset(base / "input" / "style")
    device = ("--cpu",) if demo.needs_cpu_option() else ()
    in_process.load_comfyui(comfyui, "--cpu")
    # not provide.provide, which wants the LoRA, too
    stand_in.save(provide.checkpoint(sd15), base / "models" / "checkpoints" / sd15.checkpoint)
    for left_over in (base / "output").glob("style_*.safetensors"):
        left_over.unlink()

    print("Starting ComfyUI ...", flush=True)
    start = time.monotonic()

    def on_event(kind: str, data: dict) -> None:
        if kind == "progress" and data["node"] == "train" and (data["value"] % 50 == 0 or data["value"] == 1):
            print(f"  {time.monotonic() - start:5.1f} s  step {data['value']} of {data['max']}", flush=True)

    with comfy_client.running_server(comfyui, base, options=device) as url:
        comfy_client.run_graph(url, training(sd15.checkpoint, "style", options.steps, "style"), on_event)

    (saved,) = (base / "output").glob("style_*.safetensors")
    target = provide.source(provide.LORA)
    save_file({name: tensor.half() for name, tensor in load_file(saved).items()}, target)  # ComfyUI writes float32
    print(f"Written to {target} ({target.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    environment.command(run, parse_arguments())
