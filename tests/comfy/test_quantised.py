"""Bases in 8 or fewer bits: the same control as with the same weights dequantised, or one sentence."""

import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from models import known_unet
from quantised import (
    CONTROL,
    Ggml,
    Packed,
    apart,
    assert_learns_the_same,
    in_levels,
    load,
    train,
    what_control_changes,
)
from safetensors.torch import save_file
from sampling import cond, conds, latent, picture, sample

KEY = "input_blocks.1.1.transformer_blocks.0.attn2.to_out.0.weight"
ROUNDED = 0.1  # of an 8-bit weight's norm: ComfyUI rounds what it patches


@pytest.fixture(scope="module")
def weights():
    return known_unet().model.diffusion_model.state_dict()


@pytest.fixture(scope="module")
def controlnext(run, goldens, models_folder):
    save_file(goldens.state_dict("sd15"), models_folder / "controlnext" / "whole.safetensors")
    return run("ControlNeXtLoader", controlnext_name="whole.safetensors", variant="auto")


@pytest.fixture(scope="module", params=["fp8_e4m3fn", "fp8_e5m2", "scaled fp8", "float8_e4m3fn"])
def quantised(request, run, models_folder, weights):
    """(the MODEL that ComfyUI's loader makes of a quantised state dict, a MODEL of the same weights in float32)."""
    model, exact = load(request.param, weights, run, models_folder)
    weight = dict(model.model.diffusion_model.named_parameters())[KEY]
    if request.param.startswith("fp8"):
        assert weight.dtype == getattr(torch, request.param.replace("fp8", "float8"))
    else:
        assert isinstance(weight, QuantizedTensor)
    plain = known_unet()
    plain.model.diffusion_model.load_state_dict(exact)
    return model, plain


def test_control_is_as_on_the_same_weights_dequantised_by_both_routes(quantised, controlnext, apply, hang):
    ours, expected = (what_control_changes(model, "sd15", controlnext, apply, hang) for model in quantised)
    assert expected.norm() > 0
    assert apart(ours, expected) <= CONTROL


def test_control_is_the_same_when_comfyui_loads_a_part_of_the_model_as_with_lowvram(quantised, controlnext, apply,
                                                                                   monkeypatch):
    model = quantised[0]
    positive = cond(model)
    controlled = apply(model, controlnext, picture())
    expected = sample(controlled, positive, positive, latent("sd15"), steps=1)
    load, streamed = type(controlled).load, []

    def load_little(patcher, *args, **options):
        load(patcher, *args, **options | {"lowvram_model_memory": 1, "full_load": False})
        streamed.append(patcher.model.model_lowvram)
    comfy.model_management.unload_all_models()
    monkeypatch.setattr(type(controlled), "load", load_little)
    assert torch.equal(sample(controlled, positive, positive, latent("sd15"), steps=1), expected)
    assert any(streamed)
    comfy.model_management.unload_all_models()


@pytest.mark.parametrize("mode", ["difference", "replace"])
def test_the_unet_loader_tells_differences_from_replacements_and_applies_them(quantised, models_folder, pack, mode):
    model, plain = quantised
    base = plain.model.diffusion_model.state_dict()[KEY]
    change = 0.2 * torch.randn(base.shape, generator=torch.Generator().manual_seed(1)) / base[0].numel() ** 0.5
    save_file({KEY: change if mode == "difference" else base + change}, models_folder / "controlnext" / "q.safetensors")
    output = pack("nodes.unet_loader").ControlNeXtUNetLoader.execute(model, "q.safetensors", 1.0, "auto")
    said = {"difference": "added as differences", "replace": "put in place of the MODEL's"}[mode]
    text, = output.ui.as_dict()["text"]
    assert said in text
    assert "kept in 8 bits, to which ComfyUI rounds the sum" in text
    patched = output.result[0].patch_weight_to_device(f"diffusion_model.{KEY}", torch.device("cpu"), return_weight=True)
    patched = (patched.dequantize() if isinstance(patched, QuantizedTensor) else patched).float()
    assert float((patched - base - change).norm() / base.norm()) < ROUNDED


def test_base_weights_are_those_that_the_model_computes_with(quantised, pack):
    model, plain = quantised
    read, exact = pack("nodes.runtime.base_weights").BaseWeights(model), plain.model.diffusion_model.state_dict()
    assert read.shapes == {key: tuple(value.shape) for key, value in exact.items()}
    for key in (KEY, "out.2.weight"):
        assert torch.allclose(read(key), exact[key], atol=1e-6)


def test_a_base_in_8_bits_that_multiplies_in_more_is_told_nothing(quantised, controlnext, pack):
    assert "text" not in pack("nodes.apply").ControlNeXtApply.execute(quantised[0], controlnext, picture(), 1.0, 0.0,
                                                                      1.0).ui


def test_a_base_that_multiplies_in_8_bits_is_told_by_both_routes(run, models_folder, weights, controlnext, apply, hang,
                                                                 pack, caplog):
    model, exact = load("int8_tensorwise", weights, run, models_folder)
    plain = known_unet()
    plain.model.diffusion_model.load_state_dict(exact)
    sentence = pack("nodes.runtime.resolve").FEW_BITS
    shown = pack("nodes.apply").ControlNeXtApply.execute(model, controlnext, picture(), 1.0, 0.0, 1.0)
    assert shown.ui["text"] == (sentence,)
    caplog.clear()
    hung = hang(controlnext, picture(), *conds(model))
    sample(model, *hung, latent("sd15"), steps=1)
    assert f"ControlNeXt: {sentence}" in caplog.messages
    ours, expected = (what_control_changes(one, "sd15", controlnext, apply, hang) for one in (model, plain))
    assert CONTROL < apart(ours, expected) < 0.15


@pytest.fixture(scope="module")
def packed(weights):
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model_state_dict(dict(weights), {"custom_operations": Packed})


def test_control_acts_on_a_base_whose_own_layers_unpack_its_weights(packed, weights, controlnext, apply):
    exact = {key: in_levels(value) if value.ndim == 2 else value for key, value in weights.items()}
    plain = known_unet()
    plain.model.diffusion_model.load_state_dict(exact)
    changed = []
    for model in (packed, plain):
        positive, negative = cond(model, 0), cond(model, 1)
        off, on = (sample(one, positive, negative, latent("sd15"), steps=1)
                   for one in (model, apply(model, controlnext, picture())))
        changed.append(on - off)
    assert apart(*changed) <= CONTROL


def test_unet_weights_on_such_a_base_are_refused_in_one_sentence(packed, weights, run, models_folder):
    save_file({KEY: weights[KEY]}, models_folder / "controlnext" / "q.safetensors")
    words = (r"^model: the weights of the connected MODEL are packed as uint8 in layers of Packed.Linear, which "
             r"ComfyUI can neither read nor add to; connect the same model in fp16, fp8 or GGUF\.$")
    with pytest.raises(ValueError, match=words):
        run("ControlNeXtUNetLoader", model=packed, unet_name="q.safetensors", strength=1.0, mode="auto")


@pytest.fixture(scope="module")
def gguf(weights):
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model_state_dict(dict(weights), {"custom_operations": Ggml})


def test_weights_in_gguf_are_read_by_the_packs_own_function(gguf, weights, pack):
    with torch.inference_mode():
        read = pack("nodes.runtime.base_weights").BaseWeights(gguf)
        assert read.shapes == {key: tuple(value.shape) for key, value in weights.items()}
        assert torch.allclose(read(KEY), in_levels(weights[KEY]), atol=1e-6)


def test_training_learns_the_same_as_on_the_weights_dequantised(quantised, run):
    assert_learns_the_same(run, quantised, latent("sd15").shape)


def test_training_unet_weights_on_gguf_is_refused_in_one_sentence(gguf, run):
    words = (r"^trainable: the connected MODEL is in GGUF, whose layers add nothing to their weights while they train; "
             r"connect the same model in fp16 or fp8, or set trainable to module\.$")
    with pytest.raises(ValueError, match=words):
        train(run, gguf, latent("sd15").shape)
