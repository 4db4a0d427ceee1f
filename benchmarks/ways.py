"""The ways to control a sampling that the benchmarks compare, each a MODEL and its CONDITIONING."""

from __future__ import annotations

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_management
import comfy.ops
import harness
import torch
import torch.nn.functional as F
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP


class ReferenceControl:
    """Control as the reference implementation computes it, written for comparison only.

    In every forward the whole module runs on the control images of both guidance halves, its features are normalized
    to those of the UNet and added: nothing is shared between the halves or the steps.
    """

    def __init__(self, control):
        self.patcher, self.family, self.place = control.loaded.patcher, control.resolved.family, control.place
        self.images, self.gains = control.settings.image.movedim(-1, 1), control.resolved.gains
        self.features = self.gain = None

    def prepare(self, executor, x, t, *rest, **kwargs):
        """APPLY_MODEL wrapper: run the module on the doubled batch."""
        options = next(one for one in (*rest, kwargs.get("transformer_options")) if isinstance(one, dict))
        halves = options["cond_or_uncond"]
        dtype = executor.class_obj.get_dtype_inference()
        self.images = self.images.to(x.device, dtype)
        images = self.images.repeat(len(x) // len(self.images), 1, 1, 1)
        timesteps = executor.class_obj.model_sampling.timestep(t).float()
        self.features = self.patcher.model(images, timesteps, self.family.stem_padding, self.family.stem_pool)

        gains = torch.tensor([self.gains[half] for half in halves], device=x.device, dtype=dtype)
        self.gain = gains.repeat_interleave(len(x) // len(halves))[:, None, None, None]
        return executor(x, t, *rest, **kwargs)

    def __call__(self, h, options):
        if options["block"] != self.place.block:
            return h
        control = self.features
        if self.family.pool_first:
            control = F.adaptive_avg_pool2d(control, h.shape[-2:])
        dims = {"dim": (1, 2, 3), "keepdim": True}
        control = ((control - control.mean(**dims)) * (h.std(**dims) / (control.std(**dims) + self.family.eps))
                   + h.mean(**dims))
        if not self.family.pool_first:
            control = F.adaptive_avg_pool2d(control, h.shape[-2:])
        return h + control * self.gain

    def models(self):
        return [self.patcher]

    def to(self, device_or_dtype):
        return self


def with_reference_control(pack: harness.Pack, model: ModelPatcher, controlled: ModelPatcher) -> ModelPatcher:
    """``model`` under the same control as ``controlled`` (of our Apply node), computed as the reference does."""
    running = pack.module("nodes.runtime.resolve").model_of(controlled)
    options = controlled.model_options["transformer_options"]
    control, = pack.module("nodes.runtime.run").controls_in(running, options).values()
    reference = ReferenceControl(control)
    model = model.clone()
    model.set_model_patch(reference, "input_block_patch_after_skip")
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "reference", reference.prepare)
    return model


def native_net(base_model: BaseModel, dtype: torch.dtype, device: str | None = None) -> comfy.cldm.cldm.ControlNet:
    """The network of ComfyUI's own ControlNet of the UNet's family and depth, its weights not filled."""
    config = dict(base_model.model_config.unet_config)
    for key in ("out_channels", "dtype", "transformer_depth_output"):
        config.pop(key, None)
    return comfy.cldm.cldm.ControlNet(hint_channels=3, dtype=dtype, device=device, operations=comfy.ops.manual_cast,
                                      **config)


def native_controlnet(model: ModelPatcher, dtype: torch.dtype) -> comfy.controlnet.ControlNet:
    """ComfyUI's own ControlNet for ``model``, with seeded random weights."""
    net = native_net(model.model, dtype)
    harness.fill(net, torch.Generator().manual_seed(1))
    return comfy.controlnet.ControlNet(net, load_device=comfy.model_management.get_torch_device(),
                                       manual_cast_dtype=dtype)


def with_native_control(conditionings: tuple, controlnet: comfy.controlnet.ControlNet, image: torch.Tensor,
                        vae=None) -> tuple:
    """The CONDITIONINGs with one ControlNet for all, as ControlNetApplyAdvanced attaches it."""
    hinted = controlnet.copy().set_cond_hint(image.movedim(-1, 1), 1.0, (0.0, 1.0), vae)

    def with_control(conditioning: list) -> list:
        return [[context, {**extra, "control": hinted, "control_apply_to_uncond": False}]
                for context, extra in conditioning]

    return tuple(map(with_control, conditionings))
