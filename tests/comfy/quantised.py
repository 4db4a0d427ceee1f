"""State dicts in 8 or fewer bits, as ComfyUI and others save them, and custom operations that compute with such."""

import json
from collections.abc import Set

import comfy.ops
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from models import small_quantised, small_transformer
from safetensors.torch import save_file
from sampling import TRAINING, cond, conds, latent, picture, sample
from trainings import train_on

CONTROL = 0.02  # of what control changes, L2
LAYOUTS = {"float8_e4m3fn": "TensorCoreFP8E4M3Layout", "int8_tensorwise": "TensorWiseINT8Layout"}


def apart(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2."""
    return float((ours - expected).norm() / expected.norm())


def scaled_as_it_was(weights: dict, layers: Set[str]) -> tuple[dict, dict]:
    """(state dict as ComfyUI and others saved scaled fp8 at first, with these keys in it, the weights in it)."""
    stored, exact = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, dict(weights)
    for key, value in weights.items():
        stored[key] = value
        if key in layers:
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


def all_in_levels(weights: dict, layers: Set[str]) -> dict:
    """The weights, those of these keys as ``Packed`` computes with them."""
    return {key: in_levels(value) if key in layers else value for key, value in weights.items()}


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


def stored_in(form: str, weights: dict, layers: Set[str]) -> tuple[dict, dict]:
    """(state dict in a form, with these keys in it, the weights in it)."""
    if form == "gguf":
        return dict(weights), all_in_levels(weights, layers)
    return scaled_as_it_was(weights, layers) if form == "scaled fp8" else mixed(weights, form)


def load(form: str, weights: dict, run, models_folder) -> tuple:
    """(the MODEL that ComfyUI's loader makes of a denoiser's weights in a form, the weights that it computes with)."""
    if form.startswith("fp8"):
        folder = models_folder / "diffusion_models"
        folder.mkdir(exist_ok=True)
        save_file(weights, folder / "base.safetensors")
        model = run("UNETLoader", unet_name="base.safetensors", weight_dtype=form)
        kept = model.model.diffusion_model.state_dict()
        return model, {key: value.to(kept[key].dtype).float() for key, value in weights.items()}
    layers = {key for key, value in weights.items() if value.ndim == 2}
    stored, exact = stored_in(form, weights, layers)
    options = {"custom_operations": Ggml} if form == "gguf" else {}
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model_state_dict(stored, options), exact


def rebuilt(form: str, base: str, **changes) -> tuple:
    """(the small MODEL of a base, its layers' weights in a form, a MODEL of the same weights in float32).

    For bases that ComfyUI's loader knows in their released width alone.
    """
    plain = small_transformer(base, **changes)
    weights = plain.model.diffusion_model.state_dict()
    layers = {f"{name}.weight" for name, layer in plain.model.diffusion_model.named_modules()
              if isinstance(layer, torch.nn.Linear) and not name.startswith("llm_adapter.")}
    stored, exact = stored_in(form, weights, layers)
    if form == "gguf":
        loading = {"custom_operations": Ggml}
    else:
        stored, _ = comfy.utils.convert_old_quants(stored)
        loading = {"quant_config": comfy.utils.detect_layer_quantization(stored, "")}
    with torch.inference_mode():
        model = small_quantised(base, loading, stored, **changes)
    kept = dict(model.model.diffusion_model.named_parameters())
    assert all(isinstance(kept[key], QuantizedTensor) or kept[key].dtype.itemsize == 1 for key in layers)
    plain.model.diffusion_model.load_state_dict(exact)
    return model, plain


def what_control_changes(model, base: str, controlnext, apply, hang, side: int = 8) -> torch.Tensor:
    """In a sampled latent of this side, the same by both routes."""
    positive, negative = conds(model)
    empty, options = latent(base, 1, side, side), dict(cfg=3.0, steps=1)
    off = sample(model, positive, negative, empty, **options)
    on = sample(apply(model, controlnext, picture()), positive, negative, empty, **options)
    hung = hang(controlnext, picture(), positive, negative)
    assert torch.equal(on, sample(model, *hung, empty, **options))
    return on - off


def train(run, model, shape: tuple, controlnext=None) -> tuple:
    """What Train ControlNeXt gives after two steps on a latent of this shape, of a new control or of this one."""
    generator = torch.Generator().manual_seed(1)
    data = {"conditioning": [cond(model)], "latents": [{"samples": torch.randn(shape, generator=generator)}],
            "images": [torch.rand(1, 64, 64, 3, generator=generator)]}
    return train_on(run, model, data, TRAINING | dict(steps=2, learning_rate=1e-3, unet_learning_rate=1e-3,
                                                      controlnext=controlnext, filename_prefix="quantised"))


def assert_learns_the_same(run, quantised: tuple, shape: tuple, controlnext=None) -> None:
    """A training on a quantised MODEL and one on the same weights in float32."""
    (ours, losses, *_), (expected, expected_losses, *_) = (train(run, model, shape, controlnext) for model in quantised)
    assert losses["loss"] == pytest.approx(expected_losses["loss"], rel=1e-4)
    assert ours.unet_differences.keys() == expected.unet_differences.keys()
    for name, value in ours.unet_differences.items():
        assert value.any()
        assert apart(expected.unet_differences[name], value) <= CONTROL
