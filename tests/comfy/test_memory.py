"""ComfyUI is told before a sampling what memory control will take, and a module that finds too little tries again."""

import itertools
import math
from types import SimpleNamespace

import comfy.model_management
import pytest
import torch
from models import small_transformer
from sampling import conds, latent, picture, sample

from controlnext_core.families import FAMILIES
from controlnext_core.module import new_module

DTYPE = torch.float32


@pytest.fixture
def control_in(pack):
    """control_in(model): the one Control of a MODEL behind Apply ControlNeXt, as for a sampling that begins."""
    def resolved(model):
        running = pack("nodes.runtime.resolve").model_of(model)
        options = model.model_options["transformer_options"]
        control, = pack("nodes.runtime.run").controls_in(running, options).values()
        return control
    return resolved


def peak(profile: torch.profiler.profile) -> int:
    """Most bytes of tensors at once, above those at the beginning: of the process what the module alone takes."""
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.fixture(scope="module")
def wan(pack):
    """(a small Wan, a CONTROLNEXT for it whose first layers are as wide as a new one's)."""
    module = new_module(FAMILIES["wan"], out=128)
    return (small_transformer("wan"),
            pack("nodes.runtime.loaded").trained_controlnext(module.state_dict(), "auto", "wide.safetensors", {}))


@pytest.mark.parametrize("family, images, height, width", [
    ("sd15", 1, 512, 512), ("sdxl", 1, 512, 512), ("svd", 2, 576, 320), ("wan", 9, 256, 448)])
def test_a_forward_of_the_module_takes_what_is_told_within_a_fifth(
        pack, apply, unets, controlnexts, wan, control_in, family, images, height, width):
    at, video = (height // 8, width // 8), family == "wan"
    frames = (images - 1) // 4 + 1 if video else images
    model, controlnext = wan if video else (unets[family], controlnexts[family])
    control = control_in(apply(model, controlnext, picture(1, images, height, width)))
    shape = (1, 16, frames, *at) if video else (images, 4, *at)
    forward = pack("nodes.runtime.forward").describe(control.sampling, DTYPE, shape, torch.tensor([0.9]), {})
    control.loaded.features.clear()
    with torch.inference_mode(), torch.profiler.profile(profile_memory=True) as profile:
        result = control(forward)
    taken = peak(profile) - 12 * images * height * width  # a copy of the images, which a run has in host memory
    control.loaded.features.clear()
    control.loaded.end_run()
    told = sum(control.memory(shape, DTYPE))
    print(f"{family}, {images} of {width}x{height}: {told / 2 ** 20:.0f} MB told, {taken / 2 ** 20:.0f} taken")
    shape = result[0].shape  # of a video the frames lie below one another
    assert (shape[3] // (at[0] // 2) if video else shape[1]) == frames
    assert abs(taken / told - 1) <= 0.2


def test_on_a_model_it_is_told_beside_what_the_sampling_itself_needs(apply, unets, controlnexts, asked, control_in):
    bare = unets["sd15"]
    one = apply(bare, controlnexts["sd15"], picture(1))
    two = apply(one, controlnexts["sd15"], picture(2))
    for model in (bare, one, two):
        sample(model, *conds(model, "sd15"), latent("sd15"), steps=1)
    running, staying = control_in(one).memory((8, 8), DTYPE)
    assert running > staying > 0
    assert asked[1] - asked[0] == running + staying
    assert asked[2] - asked[0] == running + 2 * staying, "they run one after the other"


@pytest.mark.versions
@pytest.mark.parametrize("base", ["sd15", "wan"])
def test_on_conditionings_the_same_is_told_whatever_the_size_of_the_image(apply, hang, unets, controlnexts, wan, asked,
                                                                        base):
    """Of two in a row and of one by each route, too."""
    model, controlnext = wan if base == "wan" else (unets[base], controlnexts[base])
    first, second = picture(1, 5, 32, 32), picture(2)
    by_model = apply(apply(model, controlnext, first), controlnext, second)
    hung = hang(controlnext, second, *hang(controlnext, first, *conds(model)))
    by_both = apply(model, controlnext, first), hang(controlnext, second, *conds(model))
    for one, prompts in ((model, conds(model)), (by_model, conds(model)), (model, hung), by_both):
        sample(one, *prompts, latent(base), steps=1)
    assert asked[3] >= asked[2] == asked[1] > asked[0]


def out_of_memory(times: int, forward, error=comfy.model_management.OOM_EXCEPTION):
    """A forward whose device has too little memory so many times."""
    left = SimpleNamespace(times=times)

    def run(*args):
        if left.times:
            left.times -= 1
            raise error("Allocation on device: out of memory")
        return forward(*args)
    return run


# torch raises the second where a kernel, not the allocator, finds too little; a set of classes has another order in
# each process, which parallel test workers refuse
OUT_OF_MEMORY = comfy.model_management.OOM_EXCEPTION
ERRORS = list(dict.fromkeys([OUT_OF_MEMORY, getattr(comfy.model_management, "ACCELERATOR_ERROR", OUT_OF_MEMORY)]))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
@pytest.mark.parametrize("part", ["image_part", "timestep_part"])
def test_a_module_that_runs_out_of_memory_gives_up_what_is_kept_and_tries_once_more(
        apply, unets, controlnexts, monkeypatch, caplog, part, error):
    loaded = controlnexts["sd15"].loaded
    model = apply(unets["sd15"], controlnexts["sd15"], picture(4, 2))

    def result():
        return sample(model, *conds(model, "sd15"), latent("sd15", 2), steps=2)
    loaded.features.clear()
    expected = result()
    kept = loaded.features.size
    loaded.features.clear()
    monkeypatch.setattr(loaded.patcher.model, part, out_of_memory(1, getattr(loaded.patcher.model, part), error))
    assert torch.equal(result(), expected)
    assert caplog.text.count("memory ran out") == 1
    assert loaded.features.size == kept


def test_the_second_time_comfyui_says_it_in_its_own_way(apply, unets, controlnexts, monkeypatch):
    module = controlnexts["sd15"].loaded.patcher.model
    controlnexts["sd15"].loaded.features.clear()
    monkeypatch.setattr(module, "timestep_part", out_of_memory(2, module.timestep_part))
    model = apply(unets["sd15"], controlnexts["sd15"], picture(4))
    with pytest.raises(comfy.model_management.OOM_EXCEPTION, match="Allocation on device"):
        sample(model, *conds(model, "sd15"), latent("sd15"), steps=1)
    assert math.isfinite(float(sample(model, *conds(model, "sd15"), latent("sd15"), steps=1).sum()))
