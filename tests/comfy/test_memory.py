"""ComfyUI is told before a sampling what memory control will take, and a module that finds too little tries again."""

import itertools
import math
from types import SimpleNamespace

import comfy.model_management
import pytest
import torch
from sampling import conds, latent, picture, sample

DTYPE = torch.float32


def control_in(model):
    """The one Control that Apply ControlNeXt has put into a MODEL."""
    patches = model.model_options["transformer_options"]["patches"]
    control, = [control for slot in patches.values() for patch in slot for control in patch.controls]
    return control


def peak(profile: torch.profiler.profile) -> int:
    """Most bytes of tensors at once, above those at the beginning: of the process what the module alone takes."""
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.fixture
def asked(monkeypatch):
    """What ComfyUI was asked to keep free when it loaded models, in bytes."""
    found, load = [], comfy.model_management.load_models_gpu

    def note(models, memory_required=0, **rest):
        found.append(memory_required)
        return load(models, memory_required=memory_required, **rest)
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", note)
    return found


@pytest.mark.parametrize("family, images, height, width", [
    ("sd15", 1, 768, 768), ("sdxl", 1, 1024, 1024), ("svd", 2, 1024, 576)])
def test_a_forward_of_the_module_takes_what_is_told_within_a_fifth(
        pack, apply, unets, controlnexts, family, images, height, width):
    at, half = (height // 8, width // 8), pack("nodes.control").Half(True)
    forward = pack("nodes.control").Forward(5.0, (900.0,) * images, (half,), at, at, tuple(range(images)), images,
                                            images, DTYPE, torch.device("cpu"))
    control = control_in(apply(unets[family], controlnexts[family], picture(1, images, height, width)))
    control.loaded.features.clear()
    with torch.inference_mode(), torch.profiler.profile(profile_memory=True) as profile:
        result = control(forward)
    taken = peak(profile)
    control.loaded.features.clear()
    control.loaded.end_run()
    told = sum(control.memory(at, DTYPE))
    print(f"{family}, {images} of {width}x{height}: {told / 2 ** 20:.0f} MB told, {taken / 2 ** 20:.0f} taken")
    assert len(result[0][0]) == images
    assert abs(taken / told - 1) <= 0.2


def test_on_a_model_it_is_told_beside_what_the_sampling_itself_needs(apply, unets, controlnexts, asked):
    bare = unets["sd15"]
    one = apply(bare, controlnexts["sd15"], picture(1))
    two = apply(one, controlnexts["sd15"], picture(2))
    for model in (bare, one, two):
        sample(model, *conds(model, "sd15"), latent("sd15"), steps=1)
    running, staying = control_in(one).memory((8, 8), DTYPE)
    assert running > staying > 0
    assert asked[1] - asked[0] == running + staying
    assert asked[2] - asked[0] == running + 2 * staying, "they run one after the other"


def test_on_a_conditioning_it_is_told_beside_what_the_sampling_itself_needs(hang, unets, controlnexts, asked):
    model = unets["sd15"]
    hung = hang(controlnexts["sd15"], picture(1), *conds(model, "sd15"))
    for positive, negative in (conds(model, "sd15"), hung):
        sample(model, positive, negative, latent("sd15"), steps=1)
    told = sum(controlnexts["sd15"].loaded.memory(1, 64 * 64, 8 * 8, False, DTYPE))
    assert asked[1] - asked[0] >= told


def out_of_memory(times: int, forward):
    """A forward whose device has too little memory so many times."""
    left = SimpleNamespace(times=times)

    def run(*args):
        if left.times:
            left.times -= 1
            raise comfy.model_management.OOM_EXCEPTION("Allocation on device")
        return forward(*args)
    return run


@pytest.mark.parametrize("part", ["image_part", "timestep_part"])
def test_a_module_that_runs_out_of_memory_gives_up_what_is_kept_and_tries_once_more(
        apply, unets, controlnexts, monkeypatch, caplog, part):
    loaded = controlnexts["sd15"].loaded
    model = apply(unets["sd15"], controlnexts["sd15"], picture(4, 2))

    def result():
        return sample(model, *conds(model, "sd15"), latent("sd15", 2), steps=2)
    loaded.features.clear()
    expected = result()
    kept = loaded.features.size
    loaded.features.clear()
    monkeypatch.setattr(loaded.patcher.model, part, out_of_memory(1, getattr(loaded.patcher.model, part)))
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
