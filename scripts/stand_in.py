"""Makes stand-ins for weight files that cannot be downloaded here: right names and shapes, random numbers.

    python stand_in.py COMFYUI MODELS

writes MODELS/checkpoints/CHECKPOINT and MODELS/controlnext/CONTROLNEXT, run by an interpreter that has ComfyUI's
packages. The numbers are seeded, so every run makes the same files. The stock loader takes the checkpoint for Stable
Diffusion 1.5, since it has that model's widths; with fewer UNet blocks and the tiny VAE (TAESD) it is quick on a CPU.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import in_process

CHECKPOINT = "stand_in_sd15.safetensors"
CONTROLNEXT = "stand_in_controlnext_sd15.safetensors"

# Two levels of one block and one width, the text reaching the lower one only: 37 million parameters instead of 860.
UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "context_dim": 768, "num_heads": 8,
    "use_spatial_transformer": True, "channel_mult": (1, 1), "num_res_blocks": (1, 1), "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1], "transformer_depth_middle": 1,
}
CLIP = {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
        "hidden_act": "quick_gelu", "vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407}


def controlnext_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of a ControlNeXt file of the sd15 family, as the reference implementation saves it."""
    convolutions = {  # name: (channels in, channels out, kernel size)
        "embedding.0": (3, 64, 3), "embedding.3": (64, 64, 3), "embedding.6": (64, 128, 3),
        "down_res.0.conv1": (128, 128, 3), "down_res.0.conv2": (128, 128, 3),
        "down_res.1.conv1": (128, 256, 3), "down_res.1.conv2": (256, 256, 3), "down_res.1.conv_shortcut": (128, 256, 1),
        "down_sample.0.conv": (128, 128, 3), "down_sample.1.conv": (256, 256, 3),
        "mid_convs.0.0": (256, 256, 3), "mid_convs.0.3": (256, 256, 3), "mid_convs.1": (256, 320, 1),
    }
    linears = {  # name: (features in, features out)
        "time_embedding.linear_1": (128, 256), "time_embedding.linear_2": (256, 256),
        "down_res.0.time_emb_proj": (256, 128), "down_res.1.time_emb_proj": (256, 256),
    }
    norms = {  # name: channels
        "embedding.1": 64, "embedding.4": 64, "embedding.7": 128, "down_res.0.norm1": 128, "down_res.0.norm2": 128,
        "down_res.1.norm1": 128, "down_res.1.norm2": 256, "mid_convs.0.2": 256, "mid_convs.0.4": 256,
    }

    weights = {name: (out, channels, kernel, kernel) for name, (channels, out, kernel) in convolutions.items()}
    weights |= {name: (out, features) for name, (features, out) in linears.items()}
    weights |= {name: (channels,) for name, channels in norms.items()}
    return {f"{name}.{part}": shape if part == "weight" else shape[:1]
            for name, shape in weights.items() for part in ("weight", "bias")}


def checkpoint_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of a small checkpoint of the SD1.5 family: UNet, CLIP text encoder and tiny VAE."""
    import torch
    from comfy.clip_model import CLIPTextModel
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.ops import disable_weight_init
    from comfy.taesd.taesd import TAESD

    parts = {
        "model.diffusion_model.": UNetModel(**UNET, device="meta"),
        "cond_stage_model.transformer.": CLIPTextModel(CLIP, torch.float16, "meta", disable_weight_init),
        "first_stage_model.": TAESD(),
    }
    return {prefix + name: tuple(tensor.shape)
            for prefix, part in parts.items() for name, tensor in part.state_dict().items()}


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict:
    """Float16 tensors that keep the size of what goes through: gains 1, biases 0, the rest 1 / sqrt(inputs)."""
    import torch
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]):
        if len(shape) < 2:
            return torch.zeros(shape) if name.endswith(("bias", "vae_shift")) else torch.ones(shape)
        return torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))

    return {name: draw(name, shape).half() for name, shape in shapes.items()}


def provide(comfyui: Path, models: Path) -> None:
    """Make the files, in a process of its own, unless ComfyUI's models folder `models` holds what this script makes."""
    files = (models / "checkpoints" / CHECKPOINT, models / "controlnext" / CONTROLNEXT)
    if not all(file.is_file() and file.stat().st_mtime > Path(__file__).stat().st_mtime for file in files):
        subprocess.run([sys.executable, __file__, comfyui, models], check=True)


def save(tensors: dict, path: Path) -> None:
    """Write a weight file, which is whole when it has its name."""
    from safetensors.torch import save_file
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.replace(path)


def make(comfyui: Path, models: Path) -> None:
    """Write both files into ComfyUI's models folder `models`."""
    in_process.load_comfyui(comfyui, "--cpu")
    save(random_weights(checkpoint_shapes(), seed=0), models / "checkpoints" / CHECKPOINT)
    save(random_weights(controlnext_shapes(), seed=0), models / "controlnext" / CONTROLNEXT)


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]))
