"""Transformers in 8 or fewer bits: the same control and training as with the same weights dequantised."""

import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from models import small_transformer
from quantised import CONTROL, apart, assert_learns_the_same, load, rebuilt, what_control_changes
from sampling import latent
from tokens import BASES, new_controlnext

KNOWN = {"flux": dict(mlp_ratio=4.0), "wan": dict(freq_dim=256, text_dim=4096)}  # as ComfyUI's loader takes them to be
OTHERS = [base for base in ("hunyuan_video15", "ltxv", "ltx2", "krea2", "anima", "auraflow") if base in BASES]
EVEN = {"krea2": dict(txtlayers=2)}  # so that no layer has a single weight, where two share a byte


@pytest.fixture(scope="module", params=KNOWN)
def base(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=["fp8_e4m3fn", "scaled fp8", "gguf"])
def form(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def quantised(base, form, run, models_folder):
    """(the MODEL that ComfyUI's loader makes of quantised weights, a MODEL of the same weights in float32)."""
    plain = small_transformer(base, **KNOWN[base])
    model, exact = load(form, plain.model.diffusion_model.state_dict(), run, models_folder)
    assert type(model.model) is type(plain.model)
    assert all(isinstance(weight, QuantizedTensor) or weight.dtype.itemsize == 1
               for name, weight in model.model.diffusion_model.named_parameters()
               if "blocks" in name and weight.ndim == 2)
    plain.model.diffusion_model.load_state_dict(exact)
    return model, plain


def test_control_is_as_on_the_same_weights_dequantised_by_both_routes(base, quantised, pack, apply, hang):
    controlnext = new_controlnext(pack, base)
    ours, expected = (what_control_changes(model, base, controlnext, apply, hang) for model in quantised)
    assert expected.norm() > 0
    assert apart(ours, expected) <= CONTROL


def assert_changes_the_same(models: tuple, base: str, controlnext, apply, hang) -> None:
    """Control of a MODEL in 8 or fewer bits and of one of the same weights in float32, on 4 x 4 tokens."""
    side = 4 * BASES[base].patch
    ours, expected = (what_control_changes(model, base, controlnext, apply, hang, side) for model in models)
    assert expected.norm() > 0
    assert apart(ours, expected) <= CONTROL


@pytest.mark.parametrize("base", sorted(BASES.keys() - KNOWN.keys()))
def test_control_of_the_other_bases_is_as_on_weights_that_are_not_in_8_bits(base, pack, apply, hang):
    model, plain = small_transformer(base, torch.float8_e4m3fn), small_transformer(base)
    weights = model.model.diffusion_model.state_dict()
    assert any(weight.dtype.itemsize == 1 for weight in weights.values())
    plain.model.diffusion_model.load_state_dict(weights)
    assert_changes_the_same((model, plain), base, new_controlnext(pack, base), apply, hang)


@pytest.mark.parametrize("form", ["fp8_e4m3fn", "scaled fp8"], indirect=True)
def test_training_learns_the_same_as_on_the_weights_dequantised(base, quantised, run, pack):
    shape = latent(base)[:, :, :1].shape if base == "wan" else latent(base).shape
    assert_learns_the_same(run, quantised, shape, new_controlnext(pack, base))


@pytest.mark.parametrize("base", OTHERS)
def test_others_in_scaled_fp8_take_control_and_train_as_on_the_weights_dequantised(base, pack, apply, hang, run):
    models, controlnext, side = rebuilt("scaled fp8", base), new_controlnext(pack, base), 64 // BASES[base].ratio
    assert_changes_the_same(models, base, controlnext, apply, hang)
    shape = list(latent(base, 1, side, side).shape)
    shape[2:-2] = [1] * len(shape[2:-2])
    assert_learns_the_same(run, models, tuple(shape), controlnext)


@pytest.mark.parametrize("base", OTHERS)
def test_others_in_gguf_take_control_as_on_the_weights_dequantised(base, pack, apply, hang):
    models = rebuilt("gguf", base, **EVEN.get(base, {}))
    assert_changes_the_same(models, base, new_controlnext(pack, base), apply, hang)
