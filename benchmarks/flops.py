"""FLOPs of a sampling step at the released sizes and depths, counted by PyTorch on tensors without data.

    python benchmarks/flops.py

No memory, no weights and no GPU needed; steps.py counts the same in real samplings. A step has both guidance halves,
or one for bases that are distilled.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field

import harness

SIZES = {"sd15": (512, 512, 1), "sdxl": (1024, 1024, 1), "svd": (1024, 576, 25)}
SD3S = {  # blocks, in width as well, and what else their files tell ComfyUI
    "SD3 medium": (24, {}),
    "SD3.5 medium": (24, {"qk_norm": "rms", "x_block_self_attn_layers": list(range(13))}),
    "SD3.5 large": (38, {"qk_norm": "rms"}),
}
SD3_SIDE, SD3_TEXT = 1024, 154  # pixels, tokens
SD3_NETS = {"SD3 medium": (6, 12)}  # blocks of the ControlNets that are published
BUS = 16e9  # bytes a second from host to GPU
PACE = 80e12  # FLOPs a second that a denoiser gets from a consumer's fastest GPU


class Step:
    """One guidance half of a step of a base, on tensors without data.

    Attributes:
        denoiser: computes it.
        natives: {name: computes the same of a ControlNet of ComfyUI's own}.
        out: channels where control enters.
        size: (H, W) there.
    """

    def __init__(self, title: str, family: str, width: int, height: int, frames: int = 1):
        self.title, self.family, self.frames = title, family, frames
        self.latent = height // 8, width // 8
        self.image = empty(frames, 3, height, width)
        self.timesteps = empty(frames)
        self.natives = {}


def empty(*shape: int):
    import torch
    return torch.empty(shape, device="meta", dtype=torch.float16)


def unet_step(base: str) -> Step:
    import torch
    import ways
    from models import UNETS, unet_model

    from controlnext_core.sizes import halved
    width, height, frames = SIZES[base]
    step = Step(f"{base} {width}x{height}" + (f", {frames} frames" if frames > 1 else ""), base, width, height, frames)
    model = unet_model(base, torch.float16, "meta", **harness.DEPTHS.get(base, {})).model
    config = UNETS[base][1]
    inputs = {"timesteps": step.timesteps, "context": empty(frames, 1 if base == "svd" else 77, config["context_dim"])}
    if model.diffusion_model.num_classes is not None:
        inputs["y"] = empty(frames, config["adm_in_channels"])
    video = {} if base != "svd" else {"num_video_frames": frames,
                                      "image_only_indicator": torch.zeros(1, frames, device="meta")}
    latent = empty(frames, config["in_channels"], *step.latent)
    step.denoiser = lambda: model.diffusion_model(latent, transformer_options={}, **inputs, **video)
    step.out, step.size = 320, halved(step.latent, 0 if base == "sdxl" else 1)
    if base != "svd":  # ComfyUI has none for SVD
        net = ways.native_net(model, torch.float16, device="meta")
        step.natives[""] = lambda: net(latent, hint=step.image, **inputs)
    return step


def sd3_step(name: str) -> Step:
    import comfy.cldm.mmdit
    import comfy.ops
    import torch
    from models import sd3_model

    from controlnext_core.sizes import halved
    step = Step(f"{name} {SD3_SIDE}x{SD3_SIDE}", "sd3", SD3_SIDE, SD3_SIDE)
    depth, changes = SD3S[name]
    model = sd3_model(torch.float16, "meta", depth=depth, num_patches=192 ** 2, pos_embed_max_size=192,
                      **changes).model
    latent = empty(1, 16, *step.latent)
    inputs = {"timesteps": step.timesteps, "y": empty(1, 2048), "context": empty(1, SD3_TEXT, 4096)}
    step.denoiser = lambda: model.diffusion_model(latent, **inputs)
    step.out, step.size = 64 * depth, halved(step.latent, 1)
    config = {key: value for key, value in model.model_config.unet_config.items()
              if key not in ("dtype", "out_channels")}
    for blocks in SD3_NETS.get(name, ()):
        net = comfy.cldm.mmdit.ControlNet(num_blocks=blocks, control_latent_channels=16, dtype=torch.float16,
                                          device="meta", operations=comfy.ops.manual_cast, **config)
        step.natives[f"{blocks} blocks"] = lambda net=net: net(latent, hint=latent, **inputs)
    return step


@dataclass(frozen=True)
class Released:
    """A transformer at the size that was released.

    Attributes:
        base: whose row the tests' models have, and ``changes`` to it.
        halves: guidance halves in a step.
        text: text tokens.
        net: of the control network that ComfyUI runs for it, that was released with it: numbers of its blocks.
    """

    name: str
    base: str
    halves: int
    text: int
    changes: dict
    net: dict
    width: int = 1024
    height: int = 1024
    images: int = 1
    inputs: dict = field(default_factory=dict)


def _wan(name: str, blocks: int, width: int, feed_forward: int, vace_layers: int) -> Released:
    return Released(name, "wan", 2, 512, dict(dim=width, num_heads=width // 128, num_layers=blocks, freq_dim=256,
                                              ffn_dim=feed_forward, text_dim=4096),
                    dict(vace_layers=vace_layers, vace_in_dim=96), 832, 480, 81)


TRANSFORMERS = (
    Released("Flux.1 dev", "flux", 1, 512, dict(hidden_size=3072, num_heads=24, depth=19, depth_single_blocks=38,
                                                mlp_ratio=4.0, vec_in_dim=768, context_in_dim=4096),
             dict(depth=5, depth_single_blocks=10), inputs=dict(y=(768,), guidance=())),
    Released("Qwen-Image", "qwen_image", 2, 256, dict(num_layers=60, num_attention_heads=24, joint_attention_dim=3584),
             dict(num_layers=5)),
    Released("Z-Image Turbo", "z_image", 1, 256, dict(dim=3840, n_heads=30, n_kv_heads=30, n_layers=30, multiple_of=256,
                                                      ffn_dim_multiplier=8 / 3, cap_feat_dim=2560),
             dict(n_control_layers=6)),
    _wan("Wan 2.1 1.3B", 30, 1536, 8960, 15),
    _wan("Wan 2.1 14B", 40, 5120, 13824, 8),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="of the first run, over which its image part is spread")
    steps = parser.parse_args().steps
    harness.enter()
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def count(function, *args, **kwargs) -> tuple[int, object]:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            result = function(*args, **kwargs)
        return counter.get_total_flops(), result

    rows, copies, data = [], [], {}
    for step in (*map(unet_step, SIZES), *map(sd3_step, SD3S)):
        denoiser = 2 * count(step.denoiser)[0]
        image_part, timestep_part, whole = module_flops(count, step.family, step.out, step.image, step.timesteps,
                                                        step.size)
        natives = {name: 2 * count(native)[0] for name, native in step.natives.items()}
        added = {"reference's way": 2 * (image_part + whole),
                 "ControlNeXt, first run": timestep_part + image_part / (1 if step.frames > 1 else steps),
                 "ControlNeXt, second run": 0}
        kept = step.frames * step.out * step.size[0] * step.size[1] * 2  # bytes
        reference, *ours = (f"{flops / denoiser:.2%}" for flops in added.values())
        shown = ", ".join(f"{flops / denoiser:.2%}" + (f" ({name})" if name else "")
                          for name, flops in natives.items())
        rows.append([step.title, f"{denoiser / 1e12:.3f} T", reference, shown or "-", *ours])
        copies.append([step.title, f"{kept / 2 ** 20:.1f} MB", f"{1e3 * kept / BUS:.2f} ms",
                       f"{kept / BUS / (denoiser / PACE):.2%}"])
        data[step.title] = {"denoiser": denoiser, "image_part": image_part, "timestep_part": timestep_part,
                            "added": {**added, "native": natives}, "kept_bytes": kept}
    harness.report("flops", f"FLOPs that control adds to a step of the denoiser, first run of {steps} steps",
                   ["base", "denoiser", "reference's way", "native ControlNet", "ControlNeXt, first run", "second run"],
                   rows, {"steps": steps, "flops": data})
    print(harness.table(["base", "kept a step, float16", f"copied at {BUS / 1e9:.0f} GB/s",
                         f"of a step at {PACE / 1e12:.0f} TFLOP/s"], copies))
    transformers(count, steps)
    print("A video's image parts are not kept in its first run, for they would need too much memory.")


def module_flops(count, family: str, out: int, image, timesteps, size: tuple[int, int]) -> tuple[int, int, int]:
    """FLOPs of a family's module with so many channels in the end: (image part, timestep part, that one unpooled)."""
    import torch

    from controlnext_core.families import FAMILIES
    from controlnext_core.module import new_module
    family = FAMILIES[family]
    with torch.device("meta"):
        module = new_module(family, out=out).to(image.dtype)
    image_part, part = count(module.image_part, image, family.stem_padding, family.stem_pool)
    timestep_part, _ = count(module.timestep_part, part, timesteps, size if family.pool_first else None)
    return image_part, timestep_part, count(module.timestep_part, part, timesteps)[0]


def transformers(count, steps: int) -> None:
    """The same for transformers, beside the control networks that ComfyUI has for them."""
    import comfy.model_management
    import models
    import sampling
    import torch

    comfy.model_management.in_training = True  # ComfyUI's own kernels take no tensors without data
    rows, data = [], {}
    for one in TRANSFORMERS:
        with torch.device("meta"):
            model = models.transformer_model(one.base, torch.bfloat16, **one.changes).model
            denoiser, config = model.diffusion_model, model.model_config.unet_config
            frames = (one.images - 1) // 4 + 1
            shape = (16, *((frames,) if model.latent_format.latent_dimensions == 3 else ()), one.height // 8,
                     one.width // 8)
            latent = torch.empty(1, *shape, dtype=torch.bfloat16)
            context = torch.empty(1, one.text, next(config[name] for name in sampling.CONTEXT_WIDTHS if name in config),
                                  dtype=torch.bfloat16)
            inputs = {name: torch.empty(1, *size, dtype=torch.bfloat16) for name, size in one.inputs.items()}
            if one.base == "z_image":
                inputs["num_tokens"] = one.text
            half, _ = count(denoiser, latent, torch.empty(1), context=context, transformer_options={}, **inputs)
            net = _control_network(one, config, denoiser, latent, context, inputs, count, half)
            tokens = torch.Size((one.height // 16, one.width // 16))
            width = next(getattr(denoiser, name) for name in ("hidden_size", "inner_dim", "dim")
                         if hasattr(denoiser, name))
            image = torch.empty(1, 3, one.height, one.width, dtype=torch.bfloat16)
        at = torch.empty(1, device="meta")
        image_part, timestep_part, _ = module_flops(count, one.base, width, image, at, tokens)
        first = one.images * (timestep_part + (image_part if one.images > 1 else image_part / steps))
        step = one.halves * half
        what = f"{one.name}, {one.width}x{one.height}" + (f", {one.images} frames" if one.images > 1 else "")
        kept = frames * width * tokens.numel() * 2
        rows.append([what, f"{step / 1e12:.1f} T", f"{one.halves * net / step:.1%}", f"{first / step:.2%}", "0 %",
                     f"{kept / 2 ** 20:.0f} MB"])
        data[one.name] = {"transformer": step, "network": one.halves * net, "first": first, "kept_bytes": kept}
    harness.report("flops_transformers", f"FLOPs added to a step of a transformer, first run of {steps} steps",
                   ["base", "transformer", "ComfyUI's own", "ControlNeXt, first run", "second run", "kept a step"],
                   rows, {"steps": steps, "flops": data})


def _control_network(one: Released, config: dict, denoiser, latent, context, inputs: dict, count, half: int) -> int:
    """FLOPs of a forward of the control network that ComfyUI has for a base."""
    import comfy.ldm.flux.controlnet
    import comfy.ldm.lumina.controlnet
    import comfy.ldm.qwen_image.controlnet
    import comfy.ldm.wan.model
    import comfy.ops
    import torch

    bf16 = dict(dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init)
    given = {key: value for key, value in {**config, **one.net}.items() if key not in ("dtype", "model_type")}
    timestep = torch.empty(1)
    if one.base == "flux":
        net = comfy.ldm.flux.controlnet.ControlNetFlux(latent_input=True, **given, **bf16)
        return count(net, latent, timestep.bfloat16(), context, hint=latent, **inputs)[0]
    if one.base == "qwen_image":
        net = comfy.ldm.qwen_image.controlnet.QwenImageControlNetModel(**given, **bf16)
        return count(net, latent, timestep, context, hint=latent)[0]
    if one.base == "wan":
        net = comfy.ldm.wan.model.VaceWanModel(**given, **bf16)
        hint = torch.empty(1, 1, one.net["vace_in_dim"], *latent.shape[2:], dtype=torch.bfloat16)
        return count(net, latent, timestep, context, vace_context=hint, vace_strength=[1.0])[0] - half
    net = comfy.ldm.lumina.controlnet.ZImage_Control(**one.net, **bf16)
    tokens = torch.empty(1, latent.shape[-2] * latent.shape[-1] // 4, config["dim"], dtype=torch.bfloat16)
    rope = torch.empty(1, tokens.shape[1], 1, 64, 2, 2)
    time = torch.empty(1, 256, dtype=torch.bfloat16)
    flops, hidden = count(net, context, latent, rope, time)
    for layer in net.control_layers:
        flops += count(layer, hidden, tokens, x_mask=None, freqs_cis=rope, adaln_input=time)[0]
    return flops


if __name__ == "__main__":
    main()
