"""How well the demonstration's model follows its control, on the drawings that its training never saw.

    python benchmarks/control.py

For Canny edges (F1, an edge counts as found within one pixel) and for the drawn region (IoU): without control, at
strengths 0.5 and 1, with the style LoRA, and with another drawing's control. The share of the way goes from what the
same model draws without control (0) to what its VAE makes of the drawing itself (1).
"""

from __future__ import annotations

import world

SEEDS = (1, 2, 3)
TURN = 7  # another drawing: so many places further
SHEET = 16  # drawings in the picture of them


def main() -> None:
    import argparse
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    options = parser.parse_args()
    world.enter()
    import numpy as np
    import torch

    from demo_model import provide
    from demo_model.agreement import share_of_the_way
    from demo_model.measure import agreements
    from demo_model.world import load_held_out

    drawings, captions = load_held_out(provide.WEIGHTS)
    demonstration = world.Pack().demonstration(drawings, captions)
    styled = demonstration.styled()
    bare = {(seed, model is styled): demonstration.draw(seed, model=model)
            for seed in options.seeds for model in (None, styled)}
    reconstructed = demonstration.ceiling()
    results, rows = {}, [bare[options.seeds[0], False]]
    for kind, see in (("canny", demonstration.edges), ("mask", demonstration.regions)):
        controls = see(demonstration.images)
        others = np.roll(controls, TURN, axis=0)
        ceiling = agreements(see(reconstructed), controls, kind)
        found = {name: [] for name in ("off", "0.5", "1", "off, LoRA", "1, LoRA", "off, another's", "another's")}
        rows.append(torch.from_numpy(controls)[..., None].expand(-1, -1, -1, 3))
        for seed in options.seeds:
            for name, wanted, pictures in (
                ("off", controls, bare[seed, False]),
                ("0.5", controls, demonstration.draw(seed, kind, controls, 0.5)),
                ("1", controls, demonstration.draw(seed, kind, controls)),
                ("off, LoRA", controls, bare[seed, True]),
                ("1, LoRA", controls, demonstration.draw(seed, kind, controls, model=styled)),
                ("off, another's", others, bare[seed, False]),
                ("another's", others, demonstration.draw(seed, kind, others)),
            ):
                found[name].append(agreements(see(pictures), wanted, kind))
                if seed == options.seeds[0] and not name.startswith("off"):
                    rows.append(pictures)
        mean = {name: float(np.mean(values)) for name, values in found.items()}
        shares = {
            "0.5": share_of_the_way(mean["0.5"], mean["off"], ceiling),
            "1": share_of_the_way(mean["1"], mean["off"], ceiling),
            "1, LoRA": share_of_the_way(mean["1, LoRA"], mean["off, LoRA"], ceiling),
            "another's": share_of_the_way(mean["another's"], mean["off, another's"], ceiling),
        }
        results[kind] = {"agreement": mean, "ceiling": ceiling, "share of the way": shares, "by seed": found}
        print(kind, results[kind], flush=True)
    header = ["control", "off", "strength 0.5", "strength 1", "with LoRA: off", "1", "ceiling", "share 0.5", "share 1",
              "share with LoRA", "share towards another's"]
    table = [[kind, *(f"{result['agreement'][name]:.3f}" for name in ("off", "0.5", "1", "off, LoRA", "1, LoRA")),
              f"{result['ceiling']:.3f}", *(f"{share:.2f}" for share in result["share of the way"].values())]
             for kind, result in results.items()]
    world.report("control", f"Agreement with control, {len(drawings)} held-out drawings, {len(options.seeds)} seeds",
                 header, table, {"seeds": list(options.seeds), "captions": captions, **results})
    world.save_sheet("control", [row[:SHEET] for row in rows])


if __name__ == "__main__":
    main()
