"""FLOPs of a sampling step at the released sizes and depths, counted by PyTorch on tensors without data.

    python benchmarks/flops.py

No memory, no weights and no GPU needed; steps.py counts the same in real samplings. A step has both guidance halves,
or one for bases that are distilled.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import harness

if TYPE_CHECKING:
    import torch

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


@dataclass(frozen=True)
class Released:
    """A transformer at the size that was released.

    Attributes:
        base: whose row the tests' models have, and ``changes`` to it.
        halves: guidance halves in a step.
        text: text tokens.
        net: numbers of blocks of the control network that ComfyUI runs for it, that was released with it, if any was.
        channels: of what it denoises, with what stands beside it.
        sound: shape of the latents of a sound that it denoises as well.
        texts: prompts that stand side by side in a text token, for LTX-2's two streams one each.
        inputs: others that it takes: shapes, or values.
    """

    name: str
    base: str
    halves: int
    text: int
    changes: dict
    net: dict = field(default_factory=dict)
    width: int = 1024
    height: int = 1024
    images: int = 1
    channels: int = 16
    sound: tuple = ()
    texts: int = 1
    inputs: dict = field(default_factory=dict)


def _wan(name: str, blocks: int, width: int, feed_forward: int, vace_layers: int) -> Released:
    return Released(name=name, base="wan", halves=2, text=512,
                    changes=dict(dim=width, num_heads=width // 128, num_layers=blocks, freq_dim=256,
                                 ffn_dim=feed_forward, text_dim=4096),
                    net=dict(vace_layers=vace_layers, vace_in_dim=96), width=832, height=480, images=81)


TRANSFORMERS = (
    Released(name="Flux.1 dev", base="flux", halves=1, text=512,
             changes=dict(hidden_size=3072, num_heads=24, depth=19, depth_single_blocks=38, mlp_ratio=4.0,
                          vec_in_dim=768, context_in_dim=4096),
             net=dict(depth=5, depth_single_blocks=10), inputs=dict(y=(768,), guidance=())),
    Released(name="Qwen-Image", base="qwen_image", halves=2, text=256,
             changes=dict(num_layers=60, num_attention_heads=24, joint_attention_dim=3584), net=dict(num_layers=5)),
    Released(name="Z-Image Turbo", base="z_image", halves=1, text=256,
             changes=dict(dim=3840, n_heads=30, n_kv_heads=30, n_layers=30, multiple_of=256, ffn_dim_multiplier=8 / 3,
                          cap_feat_dim=2560),
             net=dict(n_control_layers=6), inputs=dict(num_tokens=256)),
    _wan("Wan 2.1 1.3B", 30, 1536, 8960, 15),
    _wan("Wan 2.1 14B", 40, 5120, 13824, 8),
    Released(name="HunyuanVideo 1.5", base="hunyuan_video15", halves=2, text=256,
             changes=dict(hidden_size=2048, num_heads=16, depth=54, mlp_ratio=4.0, context_in_dim=3584, byt5=True),
             width=832, height=480, images=121, channels=65, inputs=dict(txt_byt5=(256, 1472))),
    Released(name="LTX-Video 0.9.8 13B", base="ltxv", halves=2, text=256,
             changes=dict(attention_head_dim=128, num_attention_heads=32, cross_attention_dim=4096, num_layers=48,
                          caption_channels=4096),
             width=832, height=480, images=121, channels=128, inputs=dict(attention_mask=None)),
    Released(name="Krea 2", base="krea2", halves=2, text=256,
             changes=dict(features=6144, heads=48, kvheads=12, multiplier=4, layers=28, tdim=256, txtdim=2560,
                          txtlayers=12, txtheads=20, txtkvheads=20)),
    Released(name="Anima", base="anima", halves=2, text=512,
             changes=dict(model_channels=2048, crossattn_emb_channels=1024, num_blocks=28, num_heads=16, mlp_ratio=4.0,
                          adaln_lora_dim=256)),
    Released(name="AuraFlow", base="auraflow", halves=2, text=256, channels=4,
             changes=dict(dim=3072, n_layers=36, n_heads=12, global_conddim=3072, cond_seq_dim=2048, n_double_layers=4,
                          max_seq=64 ** 2)),
    Released(name="LTX-2 19B", base="ltx2", halves=2, text=1024, texts=2,
             changes=dict(attention_head_dim=128, num_attention_heads=32, audio_attention_head_dim=64,
                          audio_num_attention_heads=32, cross_attention_dim=4096, audio_cross_attention_dim=2048,
                          num_layers=48, caption_channels=3840),
             width=832, height=480, images=121, channels=128, sound=(8, 121, 16)),  # of 121 frames, 25 a second
)


@dataclass(frozen=True, eq=False)
class Step:
    """A step of a base, on tensors without data.

    Attributes:
        family: its control's.
        model: ComfyUI's model object.
        denoise: computes one guidance half.
        latent: (1 or frames, C, H, W), or (1, C, frames, H, W).
        image: control images, (1 or frames, 3, H, W) in pixels.
        natives: {name: computes one half of a control network of ComfyUI's own}.
        halves: guidance halves in a step.
        natives_denoise: those run the denoiser, too.
    """

    name: str
    family: str
    model: object
    denoise: Callable
    latent: torch.Tensor
    image: torch.Tensor
    natives: dict[str, Callable]
    halves: int = 2
    natives_denoise: bool = False

    @property
    def title(self) -> str:
        frames, _, height, width = self.image.shape
        return f"{self.name}, {width}x{height}" + (f", {frames} frames" if frames > 1 else "")


def empty(*shape: int, dtype: str = "float16") -> torch.Tensor:
    import torch
    return torch.empty(shape, device="meta", dtype=getattr(torch, dtype))


def unet_step(base: str) -> Step:
    import torch
    import ways
    from models import UNETS, unet_model
    width, height, frames = SIZES[base]
    model = unet_model(base, torch.float16, "meta", **harness.DEPTHS.get(base, {})).model
    config = UNETS[base][1]
    video = {"num_video_frames": frames, "image_only_indicator": empty(1, frames)} if frames > 1 else {}
    latent = empty(frames, config["in_channels"], height // 8, width // 8)
    image = empty(frames, 3, height, width)
    inputs = {"timesteps": empty(frames), "context": empty(frames, 1 if video else 77, config["context_dim"])}
    if model.diffusion_model.num_classes is not None:
        inputs["y"] = empty(frames, config["adm_in_channels"])

    natives = {}
    if not video:  # ComfyUI has none for SVD
        net = ways.native_net(model, torch.float16, device="meta")
        natives[""] = lambda: net(latent, hint=image, **inputs)

    return Step(base, base, model, lambda: model.diffusion_model(latent, transformer_options={}, **inputs, **video),
                latent=latent, image=image, natives=natives)


def sd3_step(name: str) -> Step:
    import comfy.cldm.mmdit
    import comfy.ops
    import torch
    from models import sd3_model
    depth, changes = SD3S[name]
    model = sd3_model(torch.float16, "meta", depth=depth, num_patches=192 ** 2, pos_embed_max_size=192,
                      **changes).model
    latent = empty(1, 16, SD3_SIDE // 8, SD3_SIDE // 8)
    inputs = {"timesteps": empty(1), "y": empty(1, 2048), "context": empty(1, SD3_TEXT, 4096)}
    config = {key: value for key, value in model.model_config.unet_config.items()
              if key not in ("dtype", "out_channels")}

    def native(blocks: int) -> Callable:
        net = comfy.cldm.mmdit.ControlNet(num_blocks=blocks, control_latent_channels=16, dtype=torch.float16,
                                          device="meta", operations=comfy.ops.manual_cast, **config)
        return lambda: net(latent, hint=latent, **inputs)

    return Step(name, "sd3", model, lambda: model.diffusion_model(latent, **inputs), latent=latent,
                image=empty(1, 3, SD3_SIDE, SD3_SIDE),
                natives={f"{blocks} blocks": native(blocks) for blocks in SD3_NETS.get(name, ())})


def transformer_step(one: Released, images_a_frame: Callable) -> Step:
    import models
    import sampling
    import torch
    with torch.device("meta"):
        model = models.transformer_model(one.base, torch.bfloat16, **one.changes).model
    config = model.model_config.unet_config
    ratio = model.latent_format.spacial_downscale_ratio
    frames = (((one.images - 1) // images_a_frame(model.diffusion_model) + 1,)
              if model.latent_format.latent_dimensions == 3 else ())
    latent = empty(1, one.channels, *frames, one.height // ratio, one.width // ratio, dtype="bfloat16")
    text_width = next(config[name] for name in sampling.CONTEXT_WIDTHS if name in config) * config.get("txtlayers", 1)
    context = empty(1, one.text, text_width * one.texts, dtype="bfloat16")
    x = [latent, empty(1, *one.sound, dtype="bfloat16")] if one.sound else latent
    inputs = {name: empty(1, *value, dtype="bfloat16") if isinstance(value, tuple) else value
              for name, value in one.inputs.items()}
    with torch.device("meta"):
        natives = {"": NETS[one.base]({**config, **one.net}, latent, context, inputs)} if one.net else {}

    def denoise():
        return model.diffusion_model(x, empty(1, dtype="float32"), context=context, transformer_options={},
                                     **inputs)

    return Step(one.name, one.base, model, denoise, latent=latent,
                image=empty(one.images, 3, one.height, one.width, dtype="bfloat16"), natives=natives,
                halves=one.halves, natives_denoise=one.base in NETS_THAT_DENOISE)


def flux_net(config: dict, latent: torch.Tensor, context: torch.Tensor, inputs: dict) -> Callable:
    from comfy.ldm.flux.controlnet import ControlNetFlux
    net = ControlNetFlux(latent_input=True, **layers(config))
    return lambda: net(latent, empty(1, dtype="bfloat16"), context, hint=latent, **inputs)


def qwen_image_net(config: dict, latent: torch.Tensor, context: torch.Tensor, inputs: dict) -> Callable:
    from comfy.ldm.qwen_image.controlnet import QwenImageControlNetModel
    net = QwenImageControlNetModel(**layers(config))
    return lambda: net(latent, empty(1, dtype="float32"), context, hint=latent, **inputs)


def z_image_net(config: dict, latent: torch.Tensor, context: torch.Tensor, inputs: dict) -> Callable:
    from comfy.ldm.lumina.controlnet import ZImage_Control
    net = ZImage_Control(**layers({"n_control_layers": config["n_control_layers"]}))
    tokens = empty(1, latent.shape[-2] * latent.shape[-1] // 4, config["dim"], dtype="bfloat16")
    rope, time = empty(1, tokens.shape[1], 1, 64, 2, 2, dtype="float32"), empty(1, 256, dtype="bfloat16")

    def run() -> None:
        hidden = net(context, latent, rope, time)
        for layer in net.control_layers:
            layer(hidden, tokens, x_mask=None, freqs_cis=rope, adaln_input=time)
    return run


def wan_net(config: dict, latent: torch.Tensor, context: torch.Tensor, inputs: dict) -> Callable:
    from comfy.ldm.wan.model import VaceWanModel
    net = VaceWanModel(**layers(config))
    hint = empty(1, 1, config["vace_in_dim"], *latent.shape[2:], dtype="bfloat16")
    return lambda: net(latent, empty(1, dtype="float32"), context, vace_context=hint, vace_strength=[1.0])


# {base: the control network that ComfyUI has for it, from its configuration}
NETS = {"flux": flux_net, "qwen_image": qwen_image_net, "z_image": z_image_net, "wan": wan_net}
NETS_THAT_DENOISE = ("wan",)


def layers(config: dict) -> dict:
    """The arguments of a control network of this configuration in bfloat16."""
    import comfy.ops
    import torch
    return {**{name: value for name, value in config.items() if name not in ("dtype", "model_type")},
            "dtype": torch.bfloat16, "operations": comfy.ops.disable_weight_init}


def count(function: Callable, *args) -> tuple[int, object]:
    """(FLOPs of a call, what it returns)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        result = function(*args)
    return counter.get_total_flops(), result


def flops_of(step: Step, places_of: Callable, steps: int) -> dict:
    """FLOPs of a step and of what control adds to it; bytes of features that are kept of it.

    Args:
        places_of: the pack's.
        steps: number of the first run's steps, over which is spread what it computes once: all of a module without
            time, else the image part, but for a video, whose image parts are not kept.
    """
    import torch

    from controlnext_core.families import FAMILIES
    from controlnext_core.module import new_module
    from controlnext_core.sizes import halved
    family = FAMILIES[step.family]
    place = places_of(step.model.diffusion_model)[family.place_name]
    size = halved(tuple(step.latent.shape[-2:]), place.halvings)
    with torch.device("meta"):
        module = new_module(family, out=place.channels).to(step.image.dtype)
    images, timesteps = len(step.image), empty(len(step.image))

    half, _ = count(step.denoise)
    nets = {name: count(native)[0] - (half if step.natives_denoise else 0) for name, native in step.natives.items()}
    image_part, part = count(module.image_part, step.image, family.stem_padding, family.stem_pool)
    timestep_part, _ = count(module.timestep_part, part, timesteps, size if family.pool_first else None)
    unpooled, _ = count(module.timestep_part, part, timesteps)

    if not module.timed:
        first = (image_part + timestep_part) / steps
    else:
        first = timestep_part + image_part / (1 if images > 1 else steps)

    frames = step.latent.shape[2] if step.latent.ndim == 5 else len(step.latent)
    return {"denoiser": step.halves * half, "image_part": image_part, "timestep_part": timestep_part,
            "reference": step.halves * (image_part + unpooled),
            "first": first,
            "natives": {name: step.halves * flops for name, flops in nets.items()},
            "kept_bytes": frames * place.channels * size[0] * size[1] * 2}


def percent(share: float) -> str:
    """With two digits that count, as a share far below a percent needs them."""
    return f"{100 * share:.2f} %" if share >= 0.001 else f"{100 * share:.2g} %"


def report_with_reference(flops: dict[Step, dict], steps: int) -> None:
    """The table of bases for which the reference's way can be told, and what the copies of their features take."""
    rows, copies, data = [], [], {}
    for step, one in flops.items():
        denoiser, kept = one["denoiser"], one["kept_bytes"]
        natives = ", ".join(f"{native / denoiser:.2%}" + (f" ({name})" if name else "")
                            for name, native in one["natives"].items())
        rows.append([step.title, f"{denoiser / 1e12:.3f} T", f"{one['reference'] / denoiser:.2%}", natives or "-",
                     percent(one["first"] / denoiser), "0 %"])
        copies.append([step.title, f"{kept / 2 ** 20:.1f} MB", f"{1e3 * kept / BUS:.2f} ms",
                       f"{kept / BUS / (denoiser / PACE):.2%}"])
        added = {"reference's way": one["reference"], "ControlNeXt, first run": one["first"],
                 "ControlNeXt, second run": 0, "native": one["natives"]}
        data[step.name] = {"denoiser": denoiser, "image_part": one["image_part"], "timestep_part": one["timestep_part"],
                       "added": added, "kept_bytes": kept}

    harness.report("flops", f"FLOPs that control adds to a step of the denoiser, first run of {steps} steps",
                   ["base", "denoiser", "reference's way", "native ControlNet", "ControlNeXt, first run", "second run"],
                   rows, {"steps": steps, "flops": data})
    print(harness.table(["base", "kept a step, float16", f"copied at {BUS / 1e9:.0f} GB/s",
                         f"of a step at {PACE / 1e12:.0f} TFLOP/s"], copies))


def report_transformers(flops: dict[Step, dict], steps: int) -> None:
    """The table of transformers, beside the control networks that ComfyUI has for them."""
    rows, data = [], {}
    for step, one in flops.items():
        network = one["natives"].get("")
        rows.append([step.title, f"{one['denoiser'] / 1e12:.1f} T",
                     "-" if network is None else f"{network / one['denoiser']:.1%}",
                     percent(one["first"] / one["denoiser"]), "0 %", f"{one['kept_bytes'] / 2 ** 20:.0f} MB"])
        data[step.name] = {"transformer": one["denoiser"], "network": network, "first": one["first"],
                           "kept_bytes": one["kept_bytes"]}

    harness.report("flops_transformers", f"FLOPs added to a step of a transformer, first run of {steps} steps",
                   ["base", "transformer", "ComfyUI's own", "ControlNeXt, first run", "second run", "kept"],
                   rows, {"steps": steps, "flops": data})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20,
                        help="steps of the first run, over which its image part is spread")
    steps = parser.parse_args().steps
    harness.enter()
    import comfy.model_management
    comfy.model_management.in_training = True  # ComfyUI's own kernels take no tensors without data
    places = harness.Pack().module("nodes.runtime.places")
    with_reference = (*map(unet_step, SIZES), *map(sd3_step, SD3S))
    transformers = (transformer_step(one, places.images_a_frame) for one in TRANSFORMERS)
    report_with_reference({step: flops_of(step, places.places_of, steps) for step in with_reference}, steps)
    report_transformers({step: flops_of(step, places.places_of, steps) for step in transformers}, steps)
    print("A video's image parts are not kept in its first run, for they would need too much memory.")


if __name__ == "__main__":
    main()
