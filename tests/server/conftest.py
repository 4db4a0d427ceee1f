"""A real ComfyUI server as a process, with this pack and the demo's random weights."""

import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent.parent / "scripts"))
sys.path.append(str(Path(__file__).parent))  # the helpers beside this file
import comfy_client  # noqa: E402
import environment  # noqa: E402
import numpy as np  # noqa: E402
import stand_in  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


@pytest.fixture(scope="session")
def comfyui() -> Path:
    return Path(os.environ["COMFYUI_PATH"])


@pytest.fixture(scope="session")
def base(comfyui, tmp_path_factory) -> Path:
    """A ComfyUI base directory with the weights, and a node that gives poses without the models for it."""
    base = environment.base_directory(tmp_path_factory.mktemp("server"))
    shutil.copy(Path(__file__).parent / "pose_source.py", base / "custom_nodes")
    stand_in.provide(comfyui, base / "models")
    return base


@pytest.fixture(scope="session")
def full_controlnet(base) -> Path:
    """A file with a full ControlNet's names where ControlNeXt files are listed."""
    parts = ("input_hint_block.0", "zero_convs.0.0", "input_blocks.0.0", "middle_block_out.0")
    path = base / "models" / "controlnext" / "full_controlnet.safetensors"
    save_file({f"control_model.{part}.weight": torch.zeros(8, 8, 3, 3) for part in parts}, path)
    return path


@pytest.fixture(scope="session")
def pictures(base) -> None:
    """Two pictures for a training, in the input folder `training`."""
    folder = base / "input" / "training"
    folder.mkdir()
    for index in range(2):
        noise = np.random.default_rng(index).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")


@pytest.fixture(scope="session")
def url(comfyui, base):
    with comfy_client.running_server(comfyui, base, options=("--cpu",)) as url:
        yield url
