"""How well the demonstration's SD3 restores pictures, from a quarter of their size, that its training never saw.

    python benchmarks/super_resolution.py

The F1 of edges against the original's (found within one pixel) for the small picture enlarged by bicubic interpolation,
for pictures drawn under its control and its caption, from noise and from the enlarged picture under a little noise, as
an upscaler does, and for the VAE's own picture of the original. The share of the way goes from the first to the last.
PSNR is to the original, and, scaled down again, to the small picture.
"""

from __future__ import annotations

import argparse

import harness

SEEDS = (1, 2, 3)
SHEET = 16  # drawings in the picture of them
DENOISE = 0.1
KIND = "super_resolution"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    options = parser.parse_args()
    harness.enter()

    import numpy as np

    from demo_model import provide
    from demo_model.agreement import share_of_the_way
    from demo_model.drawings import load_held_out
    from demo_model.measure import agreements, psnr

    demonstration = harness.Pack().demonstration(*load_held_out(provide.WEIGHTS), base="sd3")
    originals = demonstration.images
    small = demonstration.smaller(originals)
    bicubic = demonstration.larger(small)

    found = {"bicubic": [bicubic], "VAE": [demonstration.ceiling()]}
    for beginning, given in {"noise": {}, "enlargement": {"start": bicubic, "denoise": DENOISE}}.items():
        found[f"control, from {beginning}"] = [demonstration.draw(seed, KIND, small, **given) for seed in options.seeds]
        found[f"no control, from {beginning}"] = [demonstration.draw(seed, **given) for seed in options.seeds]
    edges = demonstration.edges(originals)

    def measured(pictures: list) -> dict[str, float]:
        return {"F1": float(np.mean([agreements(demonstration.edges(one), edges, KIND) for one in pictures])),
                "PSNR": float(np.mean([psnr(one, originals) for one in pictures])),
                "PSNR, scaled down": float(np.mean([psnr(demonstration.smaller(one), small) for one in pictures]))}

    figures = {name: measured(pictures) for name, pictures in found.items()}
    off, ceiling = figures["bicubic"]["F1"], figures["VAE"]["F1"]
    for one in figures.values():
        one["share"] = share_of_the_way(one["F1"], off, ceiling)

    table = [[name, f"{one['F1']:.3f}", f"{one['share']:.2f}", f"{one['PSNR']:.1f} dB",
              f"{one['PSNR, scaled down']:.1f} dB"]
             for name, one in figures.items()]
    harness.report(KIND, f"From 24 to 96 pixels, {len(originals)} held-out drawings, {len(options.seeds)} seeds",
                   ["picture", "F1 of edges", "share of the way", "PSNR", "scaled down, to the small picture"], table,
                   {"seeds": list(options.seeds), "denoise": DENOISE, **figures})
    enlarged = demonstration.run("ImageScaleBy", image=small, upscale_method="nearest-exact", scale_by=4.0)
    harness.save_sheet(KIND, [one[:SHEET] for one in (enlarged, bicubic, found["control, from noise"][0],
                                                      found["control, from enlargement"][0], found["VAE"][0],
                                                      originals)])


if __name__ == "__main__":
    main()
