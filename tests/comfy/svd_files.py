"""Stand-ins for the files of an SVD graph: what the stock loaders take for them, small, with random weights.

    python svd_files.py COMFYUI MODELS

writes CHECKPOINT and UNET into the folders of ComfyUI's MODELS, for a server in another process.
"""

import json
import math
import sys
from pathlib import Path

if __name__ == "__main__":
    comfyui, models_folder = sys.argv[1:]
    sys.argv[1:] = ["--cpu"]  # for ComfyUI, which reads it when it is imported
    # ComfyUI before the repository: both have a folder `nodes`
    sys.path[:0] = [comfyui, str(Path(__file__).resolve().parent.parent.parent)]
    import comfy.options
    comfy.options.enable_args_parsing()

import comfy.clip_vision  # noqa: E402
import comfy.ops  # noqa: E402
import torch  # noqa: E402
from comfy.clip_model import CLIPVisionModelProjection  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402
from comfy.taesd.taesd import TAESD  # noqa: E402
from models import UNETS, narrowed  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from controlnext_core.unet_keys import diffusers_to_ldm  # noqa: E402

CHECKPOINT, UNET = "svd_small.ckpt", "svd_small_unet.safetensors"

# ComfyUI takes it for SVD by its depths and its first width; one width at all levels leaves a tenth of the parameters.
UNET_CONFIG = {**UNETS["svd"][1], "image_size": 32, "model_channels": 320, "channel_mult": [1, 1, 1, 1],
               "use_spatial_transformer": True, "legacy": False, "num_head_channels": 64}


def write_checkpoint(folder: Path) -> None:
    """CHECKPOINT: UNet, vision encoder and tiny VAE. Weights of one shape are one tensor, which the file holds once."""
    parts = {
        "model.diffusion_model.": UNetModel(**UNET_CONFIG, device="meta"),
        "conditioner.embedders.0.open_clip.model.visual.": _vision_encoder(),
        "first_stage_model.": TAESD(),
    }
    generator, drawn = torch.Generator().manual_seed(0), {}

    def weight(key: str, shape: torch.Size) -> torch.Tensor:
        kind = (shape, key.endswith(("bias", "vae_shift")))
        if kind not in drawn:
            random = len(shape) > 1
            drawn[kind] = (torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:])) if random
                           else torch.zeros(shape) if kind[1] else torch.ones(shape)).half()
        return drawn[kind]
    torch.save({prefix + key: weight(key, tensor.shape)
                for prefix, part in parts.items() for key, tensor in part.state_dict().items()}, folder / CHECKPOINT)


def _vision_encoder() -> CLIPVisionModelProjection:
    """SVD's, in full size: ComfyUI knows it by its number of layers."""
    config = json.loads((Path(comfy.clip_vision.__file__).parent / "clip_vision_config_h.json").read_text())
    with torch.device("meta"):
        return CLIPVisionModelProjection(config, torch.float16, "meta", comfy.ops.disable_weight_init)


def write_unet(folder: Path) -> None:
    """UNET: fine-tuned weights as published, a full UNet in diffusers names."""
    unet = UNetModel(**UNET_CONFIG, device="meta").state_dict()
    names = {ldm: diffusers for diffusers, ldm in diffusers_to_ldm(unet).items()}
    checkpoint = torch.load(folder.parent / "checkpoints" / CHECKPOINT, weights_only=True)
    generator = torch.Generator().manual_seed(1)

    def tuned(weight: torch.Tensor) -> torch.Tensor:
        return weight * (1 + 0.1 * torch.randn(weight.shape, generator=generator).half())
    save_file({names[key]: tuned(checkpoint[f"model.diffusion_model.{key}"]) for key in unet}, folder / UNET)


def write_controlnext(folder: Path, state_dict: dict, name: str) -> None:
    """A family's control module, its last layer cut to the only width of UNET_CONFIG."""
    save_file(narrowed(state_dict, UNET_CONFIG["model_channels"]), folder / name)


if __name__ == "__main__":
    write_checkpoint(Path(models_folder) / "checkpoints")
    write_unet(Path(models_folder) / "controlnext")
