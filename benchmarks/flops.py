"""FLOPs of a sampling step at the released sizes and depths, counted by PyTorch on tensors without data.

    python benchmarks/flops.py

No memory, no weights and no GPU needed; steps.py counts the same in real samplings. A step has both guidance halves.
"""

from __future__ import annotations

import argparse

import world

SIZES = (("sd15", 512, 512, 1), ("sdxl", 1024, 1024, 1), ("svd", 1024, 576, 25))
BUS = 16e9  # bytes a second from host to GPU
PACE = 80e12  # FLOPs a second that a UNet gets from a consumer's fastest GPU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="of the first run, over which its image part is spread")
    steps = parser.parse_args().steps
    world.enter()
    import torch
    import ways
    from models import UNETS
    from torch.utils.flop_counter import FlopCounterMode

    from controlnext_core.families import FAMILIES
    from controlnext_core.layouts import solve_widths
    from controlnext_core.module import ControlNeXtModule
    from controlnext_core.sizes import halved

    meta = torch.device("meta")

    def count(function, *args, **kwargs) -> tuple[int, object]:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            result = function(*args, **kwargs)
        return counter.get_total_flops(), result

    def empty(*shape):
        return torch.empty(shape, device=meta, dtype=torch.float16)

    shapes = world.stand_in.controlnext_shapes()
    module = ControlNeXtModule(solve_widths(shapes), shapes, device=meta, dtype=torch.float16)
    rows, copies, data = [], [], {}
    for base, width, height, frames in SIZES:
        family, (model_class, config) = FAMILIES[base], UNETS[base]
        config = {"image_size": 32, "model_channels": 320, "use_spatial_transformer": True, "dtype": torch.float16,
                  "legacy": False, **config, **world.DEPTHS.get(base, {})}
        model_config = model_class(config)
        model_config.set_inference_dtype(torch.float16, None)
        model = model_config.get_model({}, device=meta)
        unet = model.diffusion_model
        timesteps = torch.empty(frames, device=meta)
        inputs = {"timesteps": timesteps, "context": empty(frames, 1 if base == "svd" else 77, config["context_dim"])}
        if unet.num_classes is not None:
            inputs["y"] = empty(frames, config["adm_in_channels"])
        video = {} if base != "svd" else {"num_video_frames": frames,
                                          "image_only_indicator": torch.zeros(1, frames, device=meta)}
        latent = empty(frames, config["in_channels"], height // 8, width // 8)
        image = empty(frames, 3, height, width)
        half, _ = count(unet, latent, transformer_options={}, **inputs, **video)
        image_part, part = count(module.image_part, image, family.stem_padding, family.stem_pool)
        whole, _ = count(module.timestep_part, part, timesteps)
        enters = halved((height // 8, width // 8), 0 if family.place == "conv_in" else 1)
        timestep_part, _ = count(module.timestep_part, part, timesteps, enters if family.pool_first else None)
        first = timestep_part + (image_part / steps if base != "svd" else image_part)
        added = {"reference's way": 2 * (image_part + whole), "native ControlNet": None,
                 "ControlNeXt, first run": first, "ControlNeXt, second run": 0}
        if base != "svd":  # ComfyUI has none for SVD
            net = ways.native_net(model, torch.float16, device=meta)
            native, _ = count(net, latent, hint=image, **inputs)
            added["native ControlNet"] = 2 * native
        picture = f"{width}x{height}" + (f", {frames} frames" if base == "svd" else "")
        rows.append([f"{base} {picture}", f"{2 * half / 1e12:.3f} T",
                     *("-" if flops is None else f"{flops / (2 * half):.2%}" for flops in added.values())])
        kept = frames * module.out_channels * enters[0] * enters[1] * 2  # bytes
        copies.append([f"{base} {picture}", f"{kept / 2 ** 20:.1f} MB", f"{1e3 * kept / BUS:.2f} ms",
                       f"{kept / BUS / (2 * half / PACE):.2%}"])
        data[base] = {"unet": 2 * half, "image_part": image_part, "timestep_part": timestep_part, "added": added,
                      "kept_bytes": kept}
    world.report("flops", f"FLOPs that control adds to a step of the UNet, first run of {steps} steps",
                 ["base", "UNet", *added], rows, {"steps": steps, "flops": data})
    print(world.table(["base", "kept a step, float16", f"copied at {BUS / 1e9:.0f} GB/s",
                       f"of a step at {PACE / 1e12:.0f} TFLOP/s"], copies))
    print("A video's image parts are not kept in its first run, for they would need too much memory.")


if __name__ == "__main__":
    main()
