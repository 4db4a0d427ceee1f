"""Device memory of a training step at released sizes, beside a ControlNet's, counted on tensors without data.

    python benchmarks/training_memory.py

No weights and no GPU needed. The pack's own session makes a step on a MODEL whose tensors have no data, and every
tensor of the device counts from its making to its end. A row is the moment at which they are the most.
"""

from __future__ import annotations

import argparse
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import harness

if TYPE_CHECKING:
    import torch

GB = 2 ** 30
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's names
KINDS = {"weights": "weights", "trained": "trained", "moments": "moments", "gradients": "gradients",
         "kept": "kept activations", "block": "block at work"}


@dataclass(frozen=True)
class Case:
    """A model at the size that was released, with one sample.

    Attributes:
        base: whose row the tests' models have, and ``changes`` to it.
        dtype: of its weights in the file.
        latent: (1, C, h, w) or (1, C, frames, h, w).
        image: (images, height, width) of the control.
        text: (tokens, width) of the caption.
        pooled: width of its pooled text.
        net: makes the control network that the field trains, beside a model of this case.
    """

    name: str
    base: str
    dtype: str
    latent: tuple[int, ...]
    image: tuple[int, int, int]
    text: tuple[int, int]
    net: Callable
    pooled: int | None = None
    changes: dict = field(default_factory=dict)

    def model(self, dtype: str):
        """A MODEL without data, for which the device without data is the one to compute on."""
        import models
        import torch
        make = models.unet_model if self.base in models.UNETS else models.transformer_model
        model = make(self.base, getattr(torch, dtype), "meta", **self.changes)
        model.load_device = model.offload_device = torch.device("meta")
        return model


@dataclass(frozen=True)
class Native:
    """A control network of the field, trained whole beside a frozen denoiser.

    Attributes:
        frozen: modules.
        trained: parameters.
        blocks: layers that keep only their inputs, and run again for the gradients.
        forward: gives what the denoiser predicts under it.
    """

    frozen: list
    trained: list
    blocks: list
    forward: Callable


def cases() -> list[Case]:
    import flops
    released = {one.name: one for one in flops.TRANSFORMERS}
    sd3_depth, sd3_changes = flops.SD3S["SD3.5 medium"]
    sd3_changes = {"depth": sd3_depth, "num_patches": 384 ** 2, "pos_embed_max_size": 384, **sd3_changes}

    def flux(dtype: str) -> Case:
        return Case(f"Flux.1 dev, 1024x1024, {'bf16' if dtype == 'bfloat16' else 'fp8'}", "flux", dtype,
                    (1, 16, 128, 128), (1, 1024, 1024), (512, 4096), flux_net, 768, released["Flux.1 dev"].changes)

    return [
        Case("SD1.5, 512x512", "sd15", "float16", (1, 4, 64, 64), (1, 512, 512), (77, 768), unet_net),
        Case("SDXL, 1024x1024", "sdxl", "float16", (1, 4, 128, 128), (1, 1024, 1024), (77, 2048), unet_net, 1280,
             harness.DEPTHS["sdxl"]),
        Case("SD3.5 medium, 1024x1024", "sd3", "float16", (1, 16, 128, 128), (1, 1024, 1024), (154, 4096), sd3_net,
             2048, sd3_changes),
        flux("bfloat16"),
        flux("float8_e4m3fn"),
        Case("Wan 2.1 1.3B, 832x480, 33 frames", "wan", "bfloat16", (1, 16, 9, 60, 104), (33, 480, 832), (512, 4096),
             wan_net, changes=released["Wan 2.1 1.3B"].changes),
    ]


def empty(*shape: int, dtype: str = "bfloat16") -> torch.Tensor:
    import torch
    return torch.empty(shape, device="meta", dtype=getattr(torch, dtype))


def in_float32(config: dict) -> dict:
    """The arguments of a network of this configuration with weights in float32, which computes in its input's dtype."""
    import comfy.ops
    import torch
    left_out = ("dtype", "model_type", "out_channels", "transformer_depth_output")
    return {**{name: value for name, value in config.items() if name not in left_out},
            "dtype": torch.float32, "device": "meta", "operations": comfy.ops.manual_cast}


def unet_net(case: Case, model, blocks_of: Callable) -> Native:
    """The encoder and the middle copied, as in ComfyUI's ControlNet and diffusers' train_controlnet.py."""
    import comfy.cldm.cldm
    from comfy.ldm.modules.attention import SpatialTransformer
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
    denoiser, config = model.diffusion_model, model.model_config.unet_config
    net = comfy.cldm.cldm.ControlNet(hint_channels=3, **in_float32(config))
    inputs = {"x": empty(*case.latent), "timesteps": empty(1), "context": empty(1, *case.text)}
    if denoiser.num_classes is not None:
        inputs["y"] = empty(1, config["adm_in_channels"])
    hint = empty(case.image[0], 3, *case.image[1:])
    blocks = [layer for layer in net.modules() if isinstance(layer, (ResBlock, SpatialTransformer))]
    return Native([denoiser], list(net.parameters()), [*blocks_of(denoiser), *blocks],
                  lambda: denoiser(**inputs, control=net(hint=hint, **inputs), transformer_options={}))


def sd3_net(case: Case, model, blocks_of: Callable) -> Native:
    """The first 12 blocks copied, which diffusers' train_controlnet_sd3.py does unless it is told otherwise."""
    import comfy.cldm.mmdit
    denoiser = model.diffusion_model
    net = comfy.cldm.mmdit.ControlNet(num_blocks=12, control_latent_channels=16,
                                      **in_float32(model.model_config.unet_config))
    inputs = {"x": empty(*case.latent), "timesteps": empty(1), "context": empty(1, *case.text),
              "y": empty(1, case.pooled)}
    return Native([denoiser], list(net.parameters()), [*blocks_of(denoiser), *net.joint_blocks],
                  lambda: denoiser(**inputs, control=net(hint=inputs["x"], **inputs), transformer_options={}))


def flux_net(case: Case, model, blocks_of: Callable) -> Native:
    """Four double and four single blocks copied, which train_controlnet_flux.py does unless it is told otherwise."""
    from comfy.ldm.flux.controlnet import ControlNetFlux
    denoiser, config = model.diffusion_model, in_float32(model.model_config.unet_config)
    net = ControlNetFlux(latent_input=True, **{**config, "depth": 4, "depth_single_blocks": 4, "out_channels": 16})
    net.main_model_double, net.main_model_single = len(denoiser.double_blocks), len(denoiser.single_blocks)
    latent, time = empty(*case.latent), empty(1)
    inputs = {"context": empty(1, *case.text), "y": empty(1, case.pooled), "guidance": empty(1)}
    return Native([denoiser], list(net.parameters()),
                  [*blocks_of(denoiser), *net.double_blocks, *net.single_blocks],
                  lambda: denoiser(latent, time, control=net(latent, time, hint=latent, **inputs),
                                   transformer_options={}, **inputs))


def wan_net(case: Case, model, blocks_of: Callable) -> Native:
    """VACE, the control network for Wan: its 15 blocks are trained, the transformer's 30 frozen."""
    import torch
    from comfy.ldm.wan.model import VaceWanModel
    net = VaceWanModel(**in_float32(model.model_config.unet_config), vace_layers=15, vace_in_dim=96)
    trained = [net.vace_blocks, net.vace_patch_embedding]
    frozen = [part for part in net.children() if part not in trained]
    for part in frozen:
        part.to(torch.bfloat16)
    latent, text, hint = empty(*case.latent), empty(1, *case.text), empty(1, 1, 96, *case.latent[2:])
    return Native(frozen, [one for part in trained for one in part.parameters()], [*net.blocks, *net.vace_blocks],
                  lambda: net(latent, empty(1, dtype="float32"), context=text, vace_context=hint, vace_strength=[1.0]))


def meter_class() -> type:
    """The class of meters, which is PyTorch's to derive from."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map_only

    aten = torch.ops.aten

    class Meter(TorchDispatchMode):
        """In it tensors without data count, by kind, from their making to their end; the host reads ones from them.

        Attributes:
            kind: of what is made now.
            now, peak: {kind: bytes}, at the moment and when they were the most.
        """

        def __init__(self):
            super().__init__()
            self.kind, self.now, self.peak = "kept", Counter(), Counter()
            self._kinds: dict[int, tuple[str, int]] = {}

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if function is aten._local_scalar_dense.default and args[0].is_meta:
                return 1.0
            if function is aten._to_copy.default and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            if function is aten._fused_adamw_.default:  # in place, and not there for tensors without data
                return None
            result = function(*args, **kwargs)
            tree_map_only(torch.Tensor, self.count, result)
            return result

        def count(self, tensor: torch.Tensor, kind: str | None = None) -> None:
            """Count a tensor unless its storage is counted, as ``kind`` or as what is made now."""
            storage, kind = tensor.untyped_storage(), kind or self.kind
            name = storage._cdata
            if not tensor.is_meta or name in self._kinds:
                return
            self._kinds[name] = kind, storage.nbytes()
            self.now[kind] += storage.nbytes()
            weakref.finalize(storage, self._end, name)
            if self.now.total() > self.peak.total():
                self.peak = Counter(self.now)

        def turn(self, tensor: torch.Tensor, kind: str) -> None:
            """Count a tensor that is counted as another kind from now on."""
            self._end(name := tensor.untyped_storage()._cdata, size := tensor.untyped_storage().nbytes())
            self._kinds[name] = kind, size
            self.now[kind] += size

        def _end(self, name: int, *_) -> None:
            kind, size = self._kinds.pop(name)
            self.now[kind] -= size

    return Meter


def flash_attention(q, k, v, attn_mask=None, **_) -> torch.Tensor:
    """In place of PyTorch's attention, which without data is computed in parts: what a GPU computes."""
    import torch
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    mask = attn_mask.expand(*q.shape[:-1], k.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True)[0]


def load_without_data(models: list, **_) -> None:
    """In place of ComfyUI's ``load_models_gpu``, which would fill the weights: what it does to a model's layers."""
    import comfy.utils
    for model in models:
        model.patch_model(load_weights=False)
        for layer in model.model.modules():
            if hasattr(layer, "comfy_cast_weights"):
                layer.comfy_cast_weights = True
                layer.comfy_force_cast_weights = model.force_cast_weights
        for key, functions in model.weight_wrapper_patches.items():
            layer, _, name = key.rpartition(".")
            setattr(comfy.utils.get_attr(model.model, layer), f"{name}_function", list(functions))


def go_without_data() -> None:
    """Have ComfyUI in this process take models without data."""
    import comfy.model_management
    import comfy.ops
    comfy.model_management.load_models_gpu = load_without_data
    comfy.ops.scaled_dot_product_attention = flash_attention


def give_moments(optimizer) -> None:
    """Give AdamW what it has after the first step, which it cannot make without data."""
    import torch
    for parameter in [parameter for group in optimizer.param_groups for parameter in group["params"]]:
        moments = {name: torch.empty_like(parameter) for name in MOMENTS}
        optimizer.state[parameter] = {"step": torch.empty((), device="meta"), **moments}


def watch(meter, weights: list, optimizer, step: Callable) -> dict[str, int]:
    """The {kind: bytes} of a step at its worst, not the first one: the optimizer has its moments."""
    give_moments(optimizer)
    for parameter, state in optimizer.state.items():
        meter.count(parameter, "trained")
        for name in MOMENTS:
            meter.count(state[name], "moments")
        parameter.register_post_accumulate_grad_hook(lambda parameter: meter.turn(parameter.grad, "gradients"))
    for weight in weights:
        meter.count(weight, "weights")
    with meter:
        step()
    return {kind: meter.peak[kind] for kind in KINDS}


def session_of(case: Case, pack, ranks=None):
    """A session of Train ControlNeXt with its defaults, without data on the device."""
    import torch
    model = case.model(case.dtype)
    text = {} if case.pooled is None else {"pooled_output": torch.zeros(1, case.pooled)}
    samples = pack.module("nodes.training.data").samples_for(
        model, [{"samples": torch.zeros(case.latent)}], [[[torch.zeros(1, *case.text), text]]],
        [torch.zeros(*case.image, 3)])
    settings = pack.module("nodes.training.settings").TrainSettings()
    return pack.module("nodes.training.session").Session(model, samples, settings, ranks=ranks)


def of_pack(case: Case, pack, meter) -> dict[str, int]:
    """The figures of a step of Train ControlNeXt."""
    with session_of(case, pack) as session:
        tensors = [*session.clone.model.parameters(), *session.clone.model.buffers()]
        loss_of_batch = session.loss_of_batch

        def loss() -> torch.Tensor:
            result = loss_of_batch()
            meter.kind = "block"
            return result

        session.loss_of_batch = loss
        return watch(meter, tensors, session.training.optimizer, session.step)


def native_of(case: Case, pack) -> Native:
    """The field's training, with what is frozen in bf16 or fp8."""
    model = case.model(case.dtype if case.dtype.startswith("float8") else "bfloat16").model
    return case.net(case, model, pack.module("nodes.runtime.places").blocks_of)


def of_native(case: Case, pack, meter) -> dict[str, int]:
    """The figures of a step of the field's training, with the same blocks of the base running again."""
    import comfy.model_management
    import torch
    comfy.model_management.in_training = True  # ComfyUI's own kernels take no tensors without data
    native = native_of(case, pack)
    for block in native.blocks:
        block.forward = checkpointed(block.forward, pack.module("nodes.training.denoiser").OutOfPlace)
    for part in native.frozen:
        part.requires_grad_(False)
    for parameter in native.trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(native.trained, fused=True)
    frozen = [tensor for part in native.frozen for tensor in (*part.parameters(), *part.buffers())]

    def step() -> None:
        loss = native.forward().float().square().mean()
        meter.kind = "block"
        loss.backward()
        torch.nn.utils.clip_grad_norm_(native.trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return watch(meter, frozen, optimizer, step)


def checkpointed(forward: Callable, mode: type) -> Callable:
    """The forward of a layer that keeps only its inputs, within a mode."""
    from torch.utils.checkpoint import checkpoint

    def run(*args, **kwargs):
        with mode():
            return forward(*args, **kwargs)

    return lambda *args, **kwargs: checkpoint(run, *args, use_reentrant=False, **kwargs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT",
                        help="only models with this in their name, such as Flux; nothing is written then")
    arguments = parser.parse_args()
    harness.enter()
    go_without_data()
    pack, Meter = harness.Pack(), meter_class()

    rows, data = [], {}
    for case in cases():
        if arguments.only not in case.name:
            continue
        for way, count in (("ControlNeXt", of_pack), ("ControlNet", of_native)):
            one = count(case, pack, Meter())
            sizes = [f"{size / GB:.2f}" for size in one.values()]
            rows.append([f"{case.name}, {way}", *sizes, f"{sum(one.values()) / GB:.1f}"])
            print(" | ".join(rows[-1]), flush=True)
            data[f"{case.name}, {way}"] = one
    header = ["", *KINDS.values(), "together"]
    if arguments.only:
        return print(harness.table(header, rows))
    harness.report("training_memory", "Device memory of a training step, one sample, gradient checkpointing, in GB",
                   header, rows, {"bytes": data})


if __name__ == "__main__":
    main()
