"""Memory of this process over queued runs: every run has a new control image, on a small UNet of SD1.5's class.

    python benchmarks/growth.py --runs 200

The cache's bound is set low, so that it is full after a few runs and turns over from then on.
"""

from __future__ import annotations

import argparse
import statistics

import harness


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--bound-mb", type=int, default=8, help="bound of the feature cache (default: 8)")
    parser.add_argument("--size", type=int, default=128, help="side of the picture (default: 128)")
    arguments = parser.parse_args()
    harness.enter()

    import psutil
    import torch
    from models import small_unet
    from sampling import cond, sample

    pack = harness.Pack()
    controlnext = pack.controlnext("sd15")
    controlnext.loaded.features.limit = arguments.bound_mb * 2 ** 20
    model = small_unet("sd15", model_channels=320)  # as wide as the release
    conds = cond(model, 0), cond(model, 1)
    process, resident, kept = psutil.Process(), [], []

    for run in range(arguments.runs):
        image = torch.rand(1, arguments.size, arguments.size, 3, generator=torch.Generator().manual_seed(run))
        controlled = pack.run("ControlNeXtApply", model=model, controlnext=controlnext, image=image, strength=1.0,
                              start_percent=0.0, end_percent=1.0)
        latent = torch.zeros(1, 4, arguments.size // 8, arguments.size // 8)
        sample(controlled, *conds, latent, cfg=3.0, steps=4, seed=run)
        harness.give_back_memory()  # the rest is in use
        resident.append(process.memory_info().rss / 2 ** 20)
        kept.append(controlnext.loaded.features.size / 2 ** 20)

    tail = resident[len(resident) // 4:]  # by then the cache is full
    slope, start = statistics.linear_regression(range(len(tail)), tail)
    noise = statistics.stdev(value - start - slope * run for run, value in enumerate(tail))
    rows = [[str(run + 1), f"{resident[run]:.1f} MB", f"{kept[run]:.1f} MB"]
            for run in sorted({0, *range(arguments.runs // 8 - 1, arguments.runs, arguments.runs // 8)})]
    harness.report("growth", f"Resident memory over {arguments.runs} queued runs", ["run", "process", "cache"], rows,
                   {"arguments": vars(arguments), "slope_mb_per_run": slope, "noise_mb": noise,
                    "resident_mb": resident, "cache_mb": kept})
    print(f"From run {len(resident) - len(tail)} on: {slope * len(tail):+.2f} MB in {len(tail)} runs by the line "
          f"through them, around which their std is {noise:.2f} MB.")


if __name__ == "__main__":
    main()
