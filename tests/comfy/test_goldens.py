"""The UNet under control equals the reference implementation, through ComfyUI's own sampler."""

import gc

import comfy.model_management
import pytest
import torch
from golden_forwards import BASES, BOUND, control, controlled, difference, forward_inputs
from models import golden_unet
from safetensors.torch import save_file

from controlnext_core.unet_keys import diffusers_to_ldm


@pytest.fixture(scope="module", params=["sd15", "sdxl", "svd"])
def base(request):
    return request.param


@pytest.fixture(scope="module")
def unet(base, goldens):
    yield golden_unet(goldens, base)
    gc.collect()


@pytest.fixture(autouse=True)
def unpatched():
    """The UNet's weights are its own again when a test begins."""
    yield
    comfy.model_management.unload_all_models()


def first_case(goldens, base) -> dict:
    """The golden case of the family that most files of the base are of."""
    return goldens.unet[BASES[base][0]]["cases"][0]


def assert_equals_reference(goldens, base, model, case, output, positive=None):
    """One forward of a golden case, as in ``difference``."""
    found = difference(goldens, base, model, case, output, positive)
    print(f"{case['name']} {output}: {found:.2e} of the output's std")
    assert found <= BOUND[base], f"{case['name']} {output}"


def test_unet_equals_reference_without_control(goldens, base, unet):
    """The cases of a base's families are the same without control."""
    assert_equals_reference(goldens, base, unet, first_case(goldens, base), "off")


@pytest.mark.parametrize("output, strength", [("on", 1.0), ("half", 0.5)])
def test_unet_equals_reference(run, goldens, models_folder, base, unet, output, strength):
    for variant in BASES[base]:
        for case in goldens.unet[variant]["cases"]:
            model = controlled(run, goldens, models_folder, unet, variant, case, strength)
            assert_equals_reference(goldens, base, model, case, output)


@pytest.mark.parametrize("base", ["sd15"], indirect=True, scope="module")  # test_controlnet.py has all
def test_control_that_hangs_on_the_conditioning_equals_reference(run, hang, goldens, models_folder, base, unet):
    case = first_case(goldens, base)
    positive, _, _ = forward_inputs(goldens, base, unet, case)
    hung, _ = hang(**control(run, goldens, models_folder, BASES[base][0], case), positive=positive, negative=[])
    assert_equals_reference(goldens, base, unet, case, "on", hung)


def unet_weights_loaded(run, models_folder, model, tensors):
    """The MODEL behind Load ControlNeXt UNet Weights."""
    save_file(tensors, models_folder / "controlnext" / "golden_unet.safetensors")
    return run("ControlNeXtUNetLoader", model=model, unet_name="golden_unet.safetensors", strength=1.0, mode="auto")


@pytest.mark.parametrize("base", ["sd15"], indirect=True, scope="module")  # the only one whose goldens have differences
def test_unet_with_a_file_of_differences_equals_reference(run, goldens, models_folder, base, unet):
    delta = goldens.unet[base]["delta"]
    filled = goldens.weights.fill_(delta["shapes"], delta["weights_seed"])
    without = unet_weights_loaded(run, models_folder, unet, {
        key: torch.from_numpy(delta["factor"] * value) for key, value in filled.items()})
    controls = {"off": without, "on": controlled(run, goldens, models_folder, without, base, delta["case"])}
    for output, model in controls.items():
        assert_equals_reference(goldens, base, model, delta["case"], output)


def test_a_unet_that_gets_some_weights_from_a_file_equals_reference(run, goldens, models_folder, base, unet):
    """The MODEL has other weights in every fortieth tensor; a file as it is released leads back to the goldens'."""
    weights = unet.model.diffusion_model.state_dict()
    keys = dict(list(diffusers_to_ldm(weights).items())[::40])
    golden = {name: weights[key].clone() for name, key in keys.items()}
    generator = torch.Generator().manual_seed(0)
    shifts = {name: 0.2 * value.std(correction=0) * torch.randn(value.shape, generator=generator)
              for name, value in golden.items()}
    case = first_case(goldens, base)
    try:
        for name, key in keys.items():
            weights[key].sub_(shifts[name])
        model = unet_weights_loaded(run, models_folder, unet, shifts if base == "sdxl" else golden)
        model = controlled(run, goldens, models_folder, model, BASES[base][0], case)
        assert_equals_reference(goldens, base, model, case, "on")
    finally:
        for name, key in keys.items():
            weights[key].copy_(golden[name])
