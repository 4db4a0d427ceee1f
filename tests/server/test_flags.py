"""The main job under ComfyUI's flags for precision and for what it keeps: the picture that it gives without them.

On a CPU --force-fp16 and --fp8_e4m3fn-unet change how weights are kept, not what they are computed in, and
--disable-dynamic-vram changes nothing. --lowvram and --novram exclude --cpu: tests/comfy/test_quantised.py has control
on a MODEL of which ComfyUI loads a part.
"""

import comfy_client
import demo
import numpy as np
import pytest
import stand_in
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_main_job import SIZE, main_job

CHECKPOINT = "rounded_sd15.safetensors"
CONTROL = 0.02  # of what control changes, L2
FLAGS = {"torch.float8_e4m3fn": ("--fp8_e4m3fn-unet", "--cache-none"),
         "torch.float16": ("--force-fp16", "--cache-lru", "3", "--disable-dynamic-vram")}


@pytest.fixture(scope="module")
def draw(base):
    """draw(url): (picture with control, without it, nodes kept from the first run to the second)."""
    demo.put_photo(None, SIZE, base / "input")
    folder = base / "models" / "checkpoints"
    weights = load_file(folder / stand_in.CHECKPOINT)
    unet = [key for key in weights if key.startswith("model.diffusion_model.")]
    # of 8 bits already, so that the flag rounds nothing
    save_file(weights | {key: weights[key].to(torch.float8_e4m3fn).to(weights[key].dtype) for key in unet},
              folder / CHECKPOINT)

    def draw_both(url: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
        pictures = []
        for strength in (1.0, 0.0):
            graph, messages = main_job(strength=strength), []
            graph["checkpoint"]["inputs"]["ckpt_name"] = CHECKPOINT
            outputs = comfy_client.run_graph(url, graph, lambda *message, into=messages: into.append(message))
            pictures.append(np.array(Image.open(demo.image_path(base, outputs["save"]))).astype(float))
        return *pictures, [node for kind, data in messages if kind == "execution_cached" for node in data["nodes"]]
    return draw_both


@pytest.fixture(scope="module")
def expected(url, draw):
    return draw(url)


@pytest.mark.parametrize("dtype", FLAGS)
def test_the_main_job_gives_the_same_control_under_the_flags(comfyui, base, draw, expected, dtype):
    with comfy_client.running_server(comfyui, base, options=("--cpu", *FLAGS[dtype])) as url:
        on, off, kept = draw(url)
    assert f"model weight dtype {dtype}" in (base / "server.log").read_text()
    assert bool(kept) is ("--cache-none" not in FLAGS[dtype])
    changed, wanted = on - off, expected[0] - expected[1]
    assert np.abs(wanted).mean() > 1
    assert np.linalg.norm(changed - wanted) / np.linalg.norm(wanted) <= CONTROL
