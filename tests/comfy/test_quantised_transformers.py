"""Transformers in 8 or fewer bits: the same control and training as with the same weights dequantised."""

import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from models import small_transformer
from quantised import CONTROL, apart, assert_learns_the_same, load, what_control_changes
from sampling import latent
from tokens import BASES, new_controlnext

KNOWN = {"flux": dict(mlp_ratio=4.0), "wan": dict(freq_dim=256, text_dim=4096)}  # as ComfyUI's loader takes them to be


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


@pytest.mark.parametrize("base", sorted(BASES.keys() - KNOWN.keys()))
def test_control_of_the_other_bases_is_as_on_weights_that_are_not_in_8_bits(base, pack, apply, hang):
    model, plain = small_transformer(base, torch.float8_e4m3fn), small_transformer(base)
    weights = model.model.diffusion_model.state_dict()
    assert any(weight.dtype.itemsize == 1 for weight in weights.values())
    plain.model.diffusion_model.load_state_dict(weights)
    controlnext = new_controlnext(pack, base)
    ours, expected = (what_control_changes(one, base, controlnext, apply, hang) for one in (model, plain))
    assert expected.norm() > 0
    assert apart(ours, expected) <= CONTROL


@pytest.mark.parametrize("form", ["fp8_e4m3fn", "scaled fp8"], indirect=True)
def test_training_learns_the_same_as_on_the_weights_dequantised(base, quantised, run):
    assert_learns_the_same(run, quantised, latent(base)[:, :, :1].shape if base == "wan" else latent(base).shape)
