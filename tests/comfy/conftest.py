"""A real ComfyUI in this process, with the pack loaded by ComfyUI's own loader."""

import asyncio
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent.parent

if "COMFYUI_PATH" not in os.environ:
    raise pytest.UsageError("Set COMFYUI_PATH to a ComfyUI folder, or run scripts/test.py, which gets one.")

BASE = Path(tempfile.mkdtemp(prefix="controlnext-tests-"))
for folder in ("custom_nodes", "models/controlnext", "models/controlnet", "models/checkpoints", "models/loras", "input",
               "output", "temp", "user"):
    (BASE / folder).mkdir(parents=True)

sys.argv = ["main.py", "--cpu", "--base-directory", str(BASE)]  # ComfyUI reads it when comfy.cli_args is imported
sys.path.insert(0, os.environ["COMFYUI_PATH"])
sys.path.append(str(Path(__file__).parent))  # the helpers beside this file
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import torch  # noqa: E402
import utils.extra_config  # noqa: E402, F401

import nodes  # noqa: E402  after utils, as in main.py: it puts comfy/, with another utils, first

PACK = BASE / "custom_nodes" / "ComfyUI-ControlNeXt"
PACK.symlink_to(REPO, target_is_directory=True)


def pytest_unconfigure() -> None:
    shutil.rmtree(BASE, ignore_errors=True)


@pytest.fixture(scope="session")
def comfy_nodes() -> dict:
    """ComfyUI's NODE_CLASS_MAPPINGS with the built-in nodes and this pack."""
    async def load():
        await nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False)
        return await nodes.load_custom_node(str(PACK))

    assert asyncio.run(load()), "ComfyUI could not load the pack"
    return nodes.NODE_CLASS_MAPPINGS


@pytest.fixture(scope="session")
def run(comfy_nodes):
    """run(node_id, **inputs): one node executed as ComfyUI executes it, its outputs as a tuple (or the single one)."""
    def run_node(node_id: str, **inputs):
        cls = comfy_nodes[node_id]
        with torch.inference_mode():
            function = getattr(cls, cls.FUNCTION) if hasattr(cls, "GET_SCHEMA") else getattr(cls(), cls.FUNCTION)
            outputs = function(**inputs)
        outputs = getattr(outputs, "result", outputs)
        return outputs[0] if len(outputs or ()) == 1 else outputs
    return run_node


@pytest.fixture(scope="session")
def models_folder() -> Path:
    return BASE / "models"


@pytest.fixture(scope="session")
def pack(comfy_nodes):
    """pack("nodes.apply"): a module of the loaded pack, pack() itself: for what cannot be seen through its nodes."""
    root = comfy_nodes["ControlNeXtApply"].__module__.rsplit(".nodes.", 1)[0]
    return lambda name="": sys.modules[f"{root}.{name}".removesuffix(".")]


@pytest.fixture(scope="session")
def demonstrate(run, models_folder):
    """demonstrate(slice, ...): the demonstration's trained model for these of the held-out drawings."""
    from demo_model import provide
    from demo_model.drawings import load_held_out
    from demo_model.measure import Demonstration
    provide.provide(Path(os.environ["COMFYUI_PATH"]), models_folder)
    drawings, captions = load_held_out(provide.WEIGHTS)
    return lambda some, **settings: Demonstration(run, drawings[some], captions[some], **settings)


@pytest.fixture(scope="session")
def unets():
    from models import small_unets
    return small_unets()


@pytest.fixture(scope="module")
def model(base):
    """The small transformer of the module's ``base``."""
    from models import small_transformer
    return small_transformer(base)


@pytest.fixture(scope="module")
def controlnext(pack, base):
    """An untrained CONTROLNEXT for ``model``."""
    from tokens import new_controlnext
    return new_controlnext(pack, base)


@pytest.fixture(scope="session")
def controlnexts(run, goldens, models_folder):
    """{family: CONTROLNEXT}, loaded by name, as wide as the small UNets."""
    from models import narrowed
    from safetensors.torch import save_file
    from sampling import FAMILIES
    loaded = {}
    for family in FAMILIES:
        save_file(narrowed(goldens.state_dict(family)), models_folder / "controlnext" / f"{family}.safetensors")
        loaded[family] = run("ControlNeXtLoader", controlnext_name=f"{family}.safetensors", variant=family)
    return loaded


@pytest.fixture(scope="session")
def apply(run):
    """apply(model, controlnext, image, ...): Apply ControlNeXt."""
    def apply_node(model, controlnext, image, strength=1.0, start_percent=0.0, end_percent=1.0, **optional):
        return run("ControlNeXtApply", model=model, controlnext=controlnext, image=image, strength=strength,
                   start_percent=start_percent, end_percent=end_percent, **optional)
    return apply_node


@pytest.fixture(scope="session")
def hang(run):
    """hang(controlnext, image, positive, negative, ...): the same by ControlNeXt to ControlNet and Apply ControlNet."""
    def hang_node(controlnext, image, positive, negative, strength=1.0, start_percent=0.0, end_percent=1.0, **optional):
        control_net = run("ControlNeXtToControlNet", controlnext=controlnext, **optional)
        return run("ControlNetApplyAdvanced", positive=positive, negative=negative, control_net=control_net,
                   image=image, strength=strength, start_percent=start_percent, end_percent=end_percent)
    return hang_node


@pytest.fixture(params=["model", "conditioning"])
def control(request, apply, hang):
    """control(model, controlnext, image, ...): (MODEL, positive, negative) under control by one route or the other."""
    from sampling import conds

    def controlled(model, controlnext, image, positive=None, negative=None, **settings):
        prompts = conds(model)
        positive, negative = positive or prompts[0], negative or prompts[1]
        if request.param == "model":
            return apply(model, controlnext, image, **settings), positive, negative
        return model, *hang(controlnext, image, positive, negative, **settings)
    return controlled


@pytest.fixture
def cache_of(pack):
    return pack("nodes.runtime.feature_cache").FeatureCache


@pytest.fixture
def module_runs(monkeypatch):
    """module_runs(controlnext): lists that grow with every run of its image part (by the image) and timestep part."""
    def count(controlnext) -> tuple[list, list]:
        module, images, timesteps = controlnext.patcher.model, [], []
        image_part, timestep_part = module.image_part, module.timestep_part
        monkeypatch.setattr(module, "image_part", lambda image, *args: images.append(image) or image_part(image, *args))
        monkeypatch.setattr(module, "timestep_part", lambda *args: timesteps.append(1) or timestep_part(*args))
        return images, timesteps
    return count


@pytest.fixture
def asked(monkeypatch):
    """What ComfyUI was asked to keep free when it loaded models, in bytes."""
    import comfy.model_management
    found, load = [], comfy.model_management.load_models_gpu

    def note(models, memory_required=0, **rest):
        found.append(memory_required)
        return load(models, memory_required=memory_required, **rest)
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", note)
    return found


@pytest.fixture
def compiler():
    """torch.compile without what it has compiled in other tests, of which it counts how often it had to begin anew."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
