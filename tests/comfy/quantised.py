"""State dicts in 8 or fewer bits, as ComfyUI and others save them, and custom operations that compute with such."""

import json

import comfy.ops
import comfy.sd
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from safetensors.torch import save_file
from sampling import TRAINING, cond, conds, latent, picture, sample
from trainings import train_on

CONTROL = 0.02  # of what control changes, L2
LAYOUTS = {"float8_e4m3fn": "TensorCoreFP8E4M3Layout", "int8_tensorwise": "TensorWiseINT8Layout"}


def apart(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2."""
    return float((ours - expected).norm() / expected.norm())


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


def mixed(weights: dict, form: str) -> tuple[dict, dict]:
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
            stored = self.weight.as_subclass(torch.Tensor)
            levels = torch.cat([stored // 16, stored % 16], 1).float() - 8
            return torch.nn.functional.linear(input, (levels * self.levels).reshape(self.out_features, -1), self.bias)


def in_levels(weight: torch.Tensor) -> torch.Tensor:
    """What ``Packed`` computes with in place of a weight."""
    return (weight / (weight.abs().max() / 7)).round() * (weight.abs().max() / 7)


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


def load(form: str, weights: dict, run, models_folder) -> tuple:
    """(the MODEL that ComfyUI's loader makes of a denoiser's weights in a form, the weights that it computes with)."""
    if form.startswith("fp8"):
        folder = models_folder / "diffusion_models"
        folder.mkdir(exist_ok=True)
        save_file(weights, folder / "base.safetensors")
        model = run("UNETLoader", unet_name="base.safetensors", weight_dtype=form)
        kept = model.model.diffusion_model.state_dict()
        return model, {key: value.to(kept[key].dtype).float() for key, value in weights.items()}
    if form == "gguf":
        options, stored = {"custom_operations": Ggml}, dict(weights)
        exact = {key: in_levels(value) if value.ndim == 2 else value for key, value in weights.items()}
    else:
        options, (stored, exact) = {}, scaled_as_it_was(weights) if form == "scaled fp8" else mixed(weights, form)
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model_state_dict(stored, options), exact


def what_control_changes(model, base: str, controlnext, apply, hang) -> torch.Tensor:
    """In a sampled latent, the same by both routes."""
    positive, negative = conds(model)
    off = sample(model, positive, negative, latent(base), cfg=3.0, steps=1)
    on = sample(apply(model, controlnext, picture()), positive, negative, latent(base), cfg=3.0, steps=1)
    hung = hang(controlnext, picture(), positive, negative)
    assert torch.equal(on, sample(model, *hung, latent(base), cfg=3.0, steps=1))
    return on - off


def train(run, model, shape: tuple) -> tuple:
    """What Train ControlNeXt gives after two steps on a latent of this shape."""
    generator = torch.Generator().manual_seed(1)
    data = {"conditioning": [cond(model)], "latents": [{"samples": torch.randn(shape, generator=generator)}],
            "images": [torch.rand(1, 64, 64, 3, generator=generator)]}
    return train_on(run, model, data, TRAINING | dict(steps=2, learning_rate=1e-3, unet_learning_rate=1e-3,
                                                      filename_prefix="quantised"))


def assert_learns_the_same(run, quantised: tuple, shape: tuple) -> None:
    """A training on a quantised MODEL and one on the same weights in float32."""
    (ours, losses, *_), (expected, expected_losses, *_) = (train(run, model, shape) for model in quantised)
    assert losses["loss"] == pytest.approx(expected_losses["loss"], rel=1e-4)
    assert ours.unet_differences.keys() == expected.unet_differences.keys()
    for name, value in ours.unet_differences.items():
        assert value.any()
        assert apart(expected.unet_differences[name], value) <= CONTROL
