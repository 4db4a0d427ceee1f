"""Bases in 8 or fewer bits: the same control as with the same weights dequantised, or one sentence."""

import json

import comfy.model_management
import comfy.ops
import comfy.sd
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from models import known_unet
from safetensors.torch import save_file
from sampling import cond, latent, picture, sample

CONTROL = 0.02  # of what control changes, L2
KEY = "input_blocks.1.1.transformer_blocks.0.attn2.to_out.0.weight"
LAYOUTS = {"float8_e4m3fn": "TensorCoreFP8E4M3Layout", "int8_tensorwise": "TensorWiseINT8Layout"}
ROUNDED = 0.1  # of an 8-bit weight's norm: ComfyUI rounds what it patches


def apart(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2."""
    return float((ours - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def weights():
    return known_unet().model.diffusion_model.state_dict()


@pytest.fixture(scope="module")
def controlnext(run, goldens, models_folder):
    save_file(goldens.state_dict("sd15"), models_folder / "controlnext" / "whole.safetensors")
    return run("ControlNeXtLoader", controlnext_name="whole.safetensors", variant="auto")


def scaled_as_it_was(weights: dict) -> tuple[dict, dict]:
    """(state dict as ComfyUI and others saved scaled fp8 at first, the weights in it)."""
    stored, exact = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, dict(weights)
    for key, value in weights.items():
        stored[key] = value
        if value.ndim == 2:
            scale = value.abs().max() / 448
            stored[key] = (value / scale).to(torch.float8_e4m3fn)
            stored[f"{key.removesuffix('.weight')}.scale_weight"] = scale
            exact[key] = stored[key].float() * scale
    return stored, exact


def mixed(weights: dict, form: str = "float8_e4m3fn") -> tuple[dict, dict]:
    """(state dict as ComfyUI 0.30 saves quantised layers, the weights in it)."""
    stored, exact = dict(weights), dict(weights)
    for key, value in weights.items():
        if value.ndim == 2 and "transformer_blocks" in key:
            quantised = QuantizedTensor.from_float(value, LAYOUTS[form], scale="recalculate")
            stored |= quantised.state_dict(key)
            said = json.dumps({"format": form}).encode()
            stored[f"{key.removesuffix('weight')}comfy_quant"] = torch.tensor(list(said), dtype=torch.uint8)
            exact[key] = quantised.dequantize()
    return stored, exact


@pytest.fixture(scope="module", params=["fp8_e4m3fn", "fp8_e5m2", "scaled fp8", "float8_e4m3fn"])
def quantised(request, run, models_folder, weights):
    """(the MODEL that ComfyUI's loader makes of a quantised state dict, a MODEL of the same weights in float32)."""
    if request.param.startswith("fp8"):
        folder = models_folder / "diffusion_models"
        folder.mkdir(exist_ok=True)
        save_file(weights, folder / "base.safetensors")
        model = run("UNETLoader", unet_name="base.safetensors", weight_dtype=request.param)
        dtype = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[request.param]
        assert model.model.diffusion_model.state_dict()[KEY].dtype == dtype
        exact = {key: value.to(dtype).float() for key, value in weights.items()}
    else:
        stored, exact = (scaled_as_it_was if request.param == "scaled fp8" else mixed)(weights)
        with torch.inference_mode():
            model = comfy.sd.load_diffusion_model_state_dict(stored)
        assert isinstance(dict(model.model.diffusion_model.named_parameters())[KEY], QuantizedTensor)
    plain = known_unet()
    plain.model.diffusion_model.load_state_dict(exact)
    return model, plain


def test_control_is_as_on_the_same_weights_dequantised_by_both_routes(quantised, controlnext, apply, hang):
    positive, negative = cond(quantised[0], 0), cond(quantised[0], 1)
    changed = []
    for model in quantised:
        off = sample(model, positive, negative, latent("sd15"), cfg=3.0, steps=1)
        controlled = apply(model, controlnext, picture())
        on = sample(controlled, positive, negative, latent("sd15"), cfg=3.0, steps=1)
        hung = hang(controlnext, picture(), positive, negative)
        assert torch.equal(on, sample(model, *hung, latent("sd15"), cfg=3.0, steps=1))
        changed.append(on - off)
    assert changed[1].norm() > 0
    assert apart(*changed) <= CONTROL


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
    assert "kept in 8 bits, and ComfyUI rounds to them what is added" in text
    patched = output.result[0].patch_weight_to_device(f"diffusion_model.{KEY}", torch.device("cpu"), return_weight=True)
    patched = (patched.dequantize() if isinstance(patched, QuantizedTensor) else patched).float()
    assert float((patched - base - change).norm() / base.norm()) < ROUNDED


def test_base_weights_are_those_that_the_model_computes_with(quantised, pack):
    model, plain = quantised
    read, exact = pack("nodes.unet_loader").BaseWeights(model), plain.model.diffusion_model.state_dict()
    assert read.shapes == {key: tuple(value.shape) for key, value in exact.items()}
    for key in (KEY, "out.2.weight"):
        assert torch.allclose(read(key), exact[key], atol=1e-6)


def test_a_base_in_8_bits_that_multiplies_in_more_is_told_nothing(quantised, controlnext, pack):
    assert "text" not in pack("nodes.apply").ControlNeXtApply.execute(quantised[0], controlnext, picture(), 1.0, 0.0,
                                                                      1.0).ui


def test_a_base_that_multiplies_in_8_bits_is_told_by_both_routes(weights, controlnext, pack, hang, caplog):
    stored, exact = mixed(weights, "int8_tensorwise")
    with torch.inference_mode():
        model = comfy.sd.load_diffusion_model_state_dict(stored)
    plain = known_unet()
    plain.model.diffusion_model.load_state_dict(exact)
    changed, sentence = [], pack("nodes.base").FEW_BITS
    for one, told in ((model, [sentence]), (plain, [])):
        positive = cond(one)
        off = sample(one, positive, positive, latent("sd15"), steps=1)
        shown = pack("nodes.apply").ControlNeXtApply.execute(one, controlnext, picture(), 1.0, 0.0, 1.0)
        assert list(shown.ui.get("text", ())) == told
        on = sample(shown.args[0], positive, positive, latent("sd15"), steps=1)
        caplog.clear()
        hung = hang(controlnext, picture(), positive, positive)
        assert torch.equal(on, sample(one, *hung, latent("sd15"), steps=1))
        assert {record.message for record in caplog.records if "8 bits" in record.message} == {
            f"ControlNeXt: {text}" for text in told}
        changed.append(on - off)
    assert CONTROL < apart(*changed) < 0.15


class Packed(comfy.ops.manual_cast):
    """Custom ops that keep two weights in a byte, as nf4 does."""

    class Linear(comfy.ops.manual_cast.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *args):
            weight = state_dict[f"{prefix}weight"]
            self.levels = weight.abs().max() / 7
            levels = ((weight / self.levels).round() + 8).to(torch.uint8).reshape(-1, 2)
            self.bias = torch.nn.Parameter(state_dict[f"{prefix}bias"]) if self.bias is not None else None
            self.weight = torch.nn.Parameter(levels[:, :1] * 16 + levels[:, 1:], requires_grad=False)

        def forward(self, input):
            levels = torch.cat([self.weight // 16, self.weight % 16], 1).float() - 8
            return torch.nn.functional.linear(input, (levels * self.levels).reshape(self.out_features, -1), self.bias)


def in_levels(weight: torch.Tensor) -> torch.Tensor:
    """What ``Packed`` computes with in place of a weight."""
    return (weight / (weight.abs().max() / 7)).round() * (weight.abs().max() / 7)


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


class GGMLTensor(torch.Tensor):
    """As ComfyUI-GGUF's ops.py:44-88 (city96/ComfyUI-GGUF 795e451): bytes whose shape is that of the weights."""

    @property
    def shape(self):
        return self.tensor_shape

    def to(self, *args, **kwargs):
        return self

    def detach(self):
        return self


def dequantize_tensor(tensor, dtype):
    """What ComfyUI-GGUF's dequant.py:15 is, which its ops.py imports."""
    data = tensor.as_subclass(torch.Tensor)
    return ((torch.cat([data // 16, data % 16], 1).float() - 8) * tensor.levels).reshape(tensor.tensor_shape).to(dtype)


class Ggml(Packed):
    class Linear(Packed.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *args):
            super()._load_from_state_dict(state_dict, prefix, *args)
            tensor = self.weight.data.as_subclass(GGMLTensor)
            tensor.tensor_shape, tensor.levels = state_dict[f"{prefix}weight"].shape, self.levels
            self.weight = torch.nn.Parameter(tensor, requires_grad=False)


@pytest.fixture(scope="module")
def gguf(weights):
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model_state_dict(dict(weights), {"custom_operations": Ggml})


def test_weights_in_gguf_are_read_by_the_packs_own_function(gguf, weights, pack):
    with torch.inference_mode():
        read = pack("nodes.unet_loader").BaseWeights(gguf)
        assert read.shapes == {key: tuple(value.shape) for key, value in weights.items()}
        assert torch.allclose(read(KEY), in_levels(weights[KEY]), atol=1e-6)


def train(run, model, trainable: str):
    generator = torch.Generator().manual_seed(1)
    settings = dict(steps=2, batch_size=1, learning_rate=1e-3, unet_learning_rate=1e-3, seed=1, training_dtype="fp32",
                    trainable=trainable, gradient_checkpointing=False, save_every=0, preview_every=0,
                    filename_prefix="quantised")
    return run("ControlNeXtTrain", model=[model], conditioning=[cond(model)],
               latents=[{"samples": torch.randn(1, 4, 8, 8, generator=generator)}],
               images=[torch.rand(1, 64, 64, 3, generator=generator)],
               **{name: [value] for name, value in settings.items()})


def test_training_learns_the_same_as_on_the_weights_dequantised(quantised, run):
    (ours, losses, *_), (expected, expected_losses, *_) = (train(run, model, "module and UNet weights")
                                                           for model in quantised)
    assert losses["loss"] == pytest.approx(expected_losses["loss"], rel=1e-4)
    assert ours.unet_differences.keys() == expected.unet_differences.keys()
    for name, value in ours.unet_differences.items():
        assert value.any()
        assert float((value - expected.unet_differences[name]).norm() / value.norm()) <= CONTROL


def test_training_unet_weights_on_gguf_is_refused_in_one_sentence(gguf, run):
    words = (r"^trainable: the connected MODEL is in GGUF, whose layers add nothing to their weights while they train; "
             r"connect the same model in fp16 or fp8, or set trainable to module\.$")
    with pytest.raises(ValueError, match=words):
        train(run, gguf, "module and UNet weights")
