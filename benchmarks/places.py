"""The place where control should enter an SD3: Canny trained for the demonstration's, by Train ControlNeXt, at each.

    python benchmarks/places.py
    python benchmarks/places.py tokens --steps 400 --scale-learning-rate 1e-2

Few steps each, else the settings of the demonstration's own control (demo_model/control.py). The share of the way goes
from what the model draws without control (0) to what its VAE makes of the drawing itself (1), in F1 of edges. Needs npm
for the drawings.
"""

from __future__ import annotations

import argparse
import shutil

import harness

PLACES = ("tokens", "block_0", "block_1")  # before all of the four blocks, a quarter in, half in
STEPS = 250
DRAWINGS = 32
SEED = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("places", nargs="*", default=PLACES, metavar="PLACE",
                        help=f"one or more of {', '.join(PLACES)} (default: all)")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--scale-learning-rate", type=float, default=0.0, help="(default: 0, the scale stays 1)")
    options = parser.parse_args()
    harness.enter()

    from demo_model import control, provide
    from demo_model.agreement import share_of_the_way
    from demo_model.bases import BASES
    from demo_model.drawings import load_drawings, load_held_out
    from demo_model.measure import agreements

    folder = harness.environment.cache_folder() / "demo_model"
    pack, base, drawn = harness.Pack(), BASES["sd3"], load_drawings(folder)
    comfyui = pack.models.parent
    drawings, captions = (part[:DRAWINGS] for part in load_held_out(provide.WEIGHTS))
    demonstration = pack.demonstration(drawings, captions, base=base.name)
    controls = demonstration.edges(demonstration.images)
    ceiling, off = (agreements(demonstration.edges(pictures), controls, "canny")
                    for pictures in (demonstration.ceiling(), demonstration.draw(SEED)))
    found, sheet = {}, []

    for place in options.places:
        shutil.rmtree(comfyui / "output" / "controlnext_training", ignore_errors=True)
        trained = control.train(pack.run, comfyui, drawings=drawn, base=base, kind="canny", steps=options.steps,
                                encoded=folder / "sd3_encoded.pt", inject_at=place,
                                scale_learning_rate=options.scale_learning_rate)
        pack.put_control(trained, base.prefix, "canny")
        pictures = demonstration.draw(SEED, "canny", controls)
        found[place] = agreements(demonstration.edges(pictures), controls, "canny")
        sheet.append(pictures[:16])

    table = [[place, f"{on:.3f}", f"{share_of_the_way(on, off, ceiling):.2f}"] for place, on in found.items()]
    harness.report("places", f"F1 of edges after {options.steps} steps, {len(drawings)} held-out drawings; without "
                   f"control {off:.3f}, the VAE's own {ceiling:.3f}", ["place", "F1", "share of the way"], table,
                   {"off": off, "ceiling": ceiling, "found": found})
    harness.save_sheet("places", [demonstration.images[:16], *sheet])


if __name__ == "__main__":
    main()
