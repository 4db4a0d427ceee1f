"""ComfyUI's sampling on several GPUs, on one processor.

Faked is a second device, ``cpu:1``, on which torch computes as on ``cpu``. Real are ComfyUI's node that splits the
work, its copies of the MODEL for each device, its threads, and its copies of ControlNets.
"""

import comfy.model_management
import comfy.samplers
import pytest
import torch
from models import small_unet
from sampling import conds, latent, picture, relative, sample

SECOND = torch.device("cpu", 1)
BOUND = 1e-4  # of the picture's std: halves in one batch against halves in two


@pytest.fixture
def split(run, monkeypatch):
    """split(MODEL): the same behind MultiGPU CFG Split, with two devices."""
    devices = [comfy.model_management.get_torch_device(), SECOND]
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: devices)
    return lambda model: run("MultiGPU_WorkUnits", model=model, max_gpus=2)


@pytest.fixture(scope="module")
def unet():
    model = small_unet("sd15")
    model.cached_patcher_init = (small_unet, ("sd15",))
    return model


def test_each_device_computes_with_a_copy_of_the_module_in_its_own_thread(control, controlnexts, unet, split,
                                                                          monkeypatch):
    controlnext = controlnexts["sd15"]
    expected = sample(*control(unet, controlnext, picture(41)), latent("sd15"), cfg=3.0)
    copy = controlnext.loaded.copy_on(SECOND)
    used = []
    for name, loaded in (("own", controlnext.loaded), ("copy", copy)):
        module, timestep_part = loaded.patcher.model, loaded.patcher.model.timestep_part
        loaded.features.clear()

        def note(*args, name=name, timestep_part=timestep_part):
            used.append(name)
            return timestep_part(*args)
        monkeypatch.setattr(module, "timestep_part", note)

    model, *prompts = control(unet, controlnext, picture(41))
    drawn = sample(split(model), *prompts, latent("sd15"), cfg=3.0)
    assert relative(drawn, expected) <= BOUND
    assert set(used) == {"own", "copy"}, "a thread computed with another's layers"
    ours, theirs = (set(map(id, loaded.patcher.model.modules())) for loaded in (controlnext.loaded, copy))
    assert not ours & theirs
    assert controlnext.loaded.image_parts.size == copy.image_parts.size == 0


def test_the_copies_are_loaded_by_comfyui(control, controlnexts, unet, split, monkeypatch):
    loaded, load = [], comfy.model_management.load_models_gpu

    def note(models, *args, **settings):
        loaded.extend(models)
        return load(models, *args, **settings)
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", note)
    model, *prompts = control(unet, controlnexts["sd15"], picture())
    sample(split(model), *prompts, latent("sd15"), cfg=3.0, steps=1)
    assert controlnexts["sd15"].loaded.copy_on(SECOND).patcher in loaded


def test_the_order_of_the_nodes_does_not_matter(apply, controlnexts, unet, split):
    before, behind = apply(split(unet), controlnexts["sd15"], picture()), split(
        apply(unet, controlnexts["sd15"], picture()))
    drawn = [sample(model, *conds(unet), latent("sd15"), cfg=3.0) for model in (before, behind)]
    assert torch.equal(*drawn)
