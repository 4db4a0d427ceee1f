"""FLOPs of a sampling step at the released sizes and depths, counted by PyTorch on tensors without data.

    python benchmarks/flops.py

No memory, no weights and no GPU needed; steps.py counts the same in real samplings. A step has both guidance halves.
"""

from __future__ import annotations

import argparse

import world

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
    model = unet_model(base, torch.float16, "meta", **world.DEPTHS.get(base, {})).model
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="of the first run, over which its image part is spread")
    steps = parser.parse_args().steps
    world.enter()
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from controlnext_core.families import FAMILIES
    from controlnext_core.layouts import solve_widths
    from controlnext_core.module import ControlNeXtModule

    def count(function, *args) -> tuple[int, object]:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            result = function(*args)
        return counter.get_total_flops(), result

    shapes = world.stand_in.controlnext_shapes()
    rows, copies, data = [], [], {}
    for step in (*map(unet_step, SIZES), *map(sd3_step, SD3S)):
        family = FAMILIES[step.family]
        module = ControlNeXtModule(solve_widths(shapes) | {"out": step.out}, shapes, device="meta", dtype=torch.float16)
        denoiser = 2 * count(step.denoiser)[0]
        image_part, part = count(module.image_part, step.image, family.stem_padding, family.stem_pool)
        whole, _ = count(module.timestep_part, part, step.timesteps)
        timestep_part, _ = count(module.timestep_part, part, step.timesteps, step.size if family.pool_first else None)
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
    world.report("flops", f"FLOPs that control adds to a step of the denoiser, first run of {steps} steps",
                 ["base", "denoiser", "reference's way", "native ControlNet", "ControlNeXt, first run", "second run"],
                 rows, {"steps": steps, "flops": data})
    print(world.table(["base", "kept a step, float16", f"copied at {BUS / 1e9:.0f} GB/s",
                       f"of a step at {PACE / 1e12:.0f} TFLOP/s"], copies))
    print("A video's image parts are not kept in its first run, for they would need too much memory.")


if __name__ == "__main__":
    main()
