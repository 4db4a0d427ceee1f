"""How well a model of the demonstration follows its control, on the drawings that its training never saw.

    python benchmarks/control.py
    python benchmarks/control.py --base sd3

For Canny edges (F1, an edge counts as found within one pixel) and, of the SD1.5, for the drawn region (IoU): without
control, at strengths 0.5 and 1, with another drawing's control, and, of the SD1.5, with the style LoRA. The share of
the way goes from what the same model draws without control (0) to what its VAE makes of the drawing itself (1).
"""

from __future__ import annotations

import harness

SEEDS = (1, 2, 3)
TURN = 7  # another drawing: so many places further
SHEET = 16  # drawings in the picture of them
KINDS = {"sd15": ("canny", "mask"), "sd3": ("canny",)}
STYLED = ("sd15",)  # bases that the style LoRA is for


def main() -> None:
    import argparse
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", choices=KINDS, default="sd15", help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    options = parser.parse_args()
    harness.enter()
    import numpy as np
    import torch

    from demo_model import provide
    from demo_model.agreement import share_of_the_way
    from demo_model.drawings import load_held_out
    from demo_model.measure import agreements

    drawings, captions = load_held_out(provide.WEIGHTS)
    demonstration = harness.Pack().demonstration(drawings, captions, base=options.base)
    models = {"": None} | ({", LoRA": demonstration.styled()} if options.base in STYLED else {})
    bare = {(seed, name): demonstration.draw(seed, model=model)
            for seed in options.seeds for name, model in models.items()}
    reconstructed = demonstration.ceiling()
    results, table, sheet = {}, [], [bare[options.seeds[0], ""]]
    for kind in KINDS[options.base]:
        see = {"canny": demonstration.edges, "mask": demonstration.regions}[kind]
        controls = see(demonstration.images)
        others = np.roll(controls, TURN, axis=0)
        ceiling = agreements(see(reconstructed), controls, kind)
        sheet.append(torch.from_numpy(controls)[..., None].expand(-1, -1, -1, 3))
        cases = {"0.5": (controls, 0.5, ""), **{f"1{name}": (controls, 1.0, name) for name in models},
                 "another's": (others, 1.0, "")}
        on, off = ({name: [] for name in cases} for _ in range(2))
        for seed in options.seeds:
            for name, (wanted, strength, styled) in cases.items():
                pictures = demonstration.draw(seed, kind, wanted, strength, models[styled])
                on[name].append(agreements(see(pictures), wanted, kind))
                off[name].append(agreements(see(bare[seed, styled]), wanted, kind))
                if seed == options.seeds[0]:
                    sheet.append(pictures)
        shares = {name: share_of_the_way(float(np.mean(on[name])), float(np.mean(off[name])), ceiling)
                  for name in cases}
        results[kind] = {"on": on, "off": off, "ceiling": ceiling, "share of the way": shares}
        table += [[kind, name, f"{np.mean(off[name]):.3f}", f"{np.mean(on[name]):.3f}", f"{ceiling:.3f}",
                   f"{shares[name]:.2f}"] for name in cases]
        print(harness.table(["control", "strength", "off", "on", "ceiling", "share"], table), flush=True)
    name = "control" if options.base == "sd15" else f"control_{options.base}"
    harness.report(name, f"Agreement with control of the {options.base}, {len(drawings)} held-out drawings, "
                   f"{len(options.seeds)} seeds", ["control", "strength", "off", "on", "ceiling", "share"], table,
                   {"seeds": list(options.seeds), "captions": captions, **results})
    harness.save_sheet(name, [row[:SHEET] for row in sheet])


if __name__ == "__main__":
    main()
