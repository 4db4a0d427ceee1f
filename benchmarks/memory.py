"""Peak memory of a video's control: frame by frame as this pack runs the module, beside all frames at once.

    python benchmarks/memory.py

Control runs in a real sampling, but the UNet itself does not: its own memory would hide that of control.
"""

from __future__ import annotations

import argparse
import time

import harness


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="576x1024", metavar="WIDTHxHEIGHT",
                        help="size of the video (default: 576x1024)")
    parser.add_argument("--frames", type=int, default=24, help="frames of the video (default: 24)")
    arguments = parser.parse_args()
    width, height = (int(side) for side in arguments.size.split("x"))
    harness.enter()

    import torch
    import ways
    from comfy.patcher_extension import WrappersMP
    from models import small_unet
    from sampling import cond, sample

    pack = harness.Pack()
    bare = small_unet("svd", model_channels=320)  # as wide as the release
    image = torch.rand(arguments.frames, height, width, 3, generator=torch.Generator().manual_seed(0))
    latent = torch.zeros(arguments.frames, 4, height // 8, width // 8)
    controlled = pack.run("ControlNeXtApply", model=bare, controlnext=pack.controlnext("svd"), image=image,
                          strength=1.0, start_percent=0.0, end_percent=1.0)
    at_once = ways.with_reference_control(pack, bare, controlled)

    def instead_of_unet(executor, x, t, *rest, **kwargs):
        """Innermost APPLY_MODEL wrapper: control is added to features of the size that it is added to in the UNet."""
        options = next(one for one in (*rest, kwargs.get("transformer_options")) if isinstance(one, dict))
        for patch in options["patches"]["input_block_patch_after_skip"]:
            h = torch.ones(len(x), patch.place.channels, x.shape[-2] // 2, x.shape[-1] // 2, device=x.device)
            patch(h, {**options, "block": patch.place.block})
        return x

    rows, data = [], {}
    for way, model, cfg in (("ControlNeXt, both guidance halves", controlled, 3.0),
                            ("all frames at once, one guidance half", at_once, 1.0)):
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "instead", instead_of_unet)
        conds = cond(model, 0), cond(model, 1)
        harness.give_back_memory()
        start = time.perf_counter()
        with harness.PeakMemory() as memory:
            sample(model, *conds, latent, cfg=cfg, steps=1)
        rows.append([way, f"{memory.bytes / 2 ** 20:.0f} MB", f"{time.perf_counter() - start:.1f} s"])
        data[way] = {"peak_bytes": memory.bytes}
    harness.report(f"memory_{arguments.size}x{arguments.frames}",
                   f"Peak memory of control above the model and the images: svd, {arguments.size}, {arguments.frames} "
                   f"frames, float32, one step", ["way", "peak memory", "time"], rows, {"ways": data})


if __name__ == "__main__":
    main()
