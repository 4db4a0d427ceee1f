"""A real ComfyUI server as a process, with this pack and the demo's random weights, and its page in a browser.

What a page showed at the end of a test lies as browser.PICTURES/<test>.png, the last run's.
"""

import functools
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent.parent / "scripts"))
sys.path.append(str(Path(__file__).parent))  # the helpers beside this file
import browser  # noqa: E402
import comfy_client  # noqa: E402
import demo  # noqa: E402
import environment  # noqa: E402
import numpy as np  # noqa: E402
import stand_in  # noqa: E402
import torch  # noqa: E402
from frontends import SWITCH_FACE  # noqa: E402
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


@pytest.fixture(scope="module")
def open_page(url):
    """open_page(locale): ComfyUI's window, the only one, in that language."""
    playwright = pytest.importorskip("playwright.sync_api", reason="browser tests need the Python package playwright")
    with playwright.sync_playwright() as run:  # ended with this module: other tests run event loops of their own
        chromium = browser.launch(run)

        @functools.lru_cache(1)
        def open_page(locale: str):
            for context in chromium.contexts:  # of another language; a page draws on while nobody looks
                context.close()
            return browser.open_page(chromium, url, {"Comfy.Locale": locale})
        yield open_page


@pytest.fixture
def page(open_page, request):
    page = open_page("en")
    yield page
    browser.PICTURES.mkdir(exist_ok=True)
    page.screenshot(path=browser.PICTURES / f"{re.sub('[^A-Za-z0-9.]+', '_', request.node.name)}.png")
    page.evaluate(SWITCH_FACE, False)


@pytest.fixture(params=[False, True], ids=["classic", "Nodes 2.0"])
def nodes2(page, request):
    """Whether the frontend shows nodes in its newer face, as it does until the test ends."""
    page.evaluate(SWITCH_FACE, request.param)
    return request.param


@pytest.fixture
def main_job(base) -> dict:
    Image.radial_gradient("L").resize((128, 96)).convert("RGB").save(base / "input" / "browser.png")
    return demo.main_job(stand_in.CHECKPOINT, stand_in.CONTROLNEXT, "browser.png", size=(128, 96), steps=1)
