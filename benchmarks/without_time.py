"""Control with and without time: what a transformer's module loses, or not, when it does not see the timestep.

    python benchmarks/without_time.py canny
    python benchmarks/without_time.py super_resolution --seeds 0

Each module is trained by Train ControlNeXt for the demonstration's SD3, with equal steps, seeds and draws, its scale
learned: with time, as the reference has it; without time, whose features are computed once for an image; without time
but twice as wide, for what is saved from step to step; and without time, the stem's middle a quarter narrower. The
share of the way goes from what is there without control (canny: the model's own picture, super_resolution: the
enlargement) to what the VAE makes of the drawing itself, in F1 of edges. Figures are written after each measurement; a
run that was ended early leaves out what it has measured. Needs npm for the drawings.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import shutil

import harness

STEPS = (400, 1500)
TRAINED_ON = 256  # drawings
DRAWINGS = 32
BATCH = 2  # a quarter of the demonstration's, so that three seeds of each take hours and not days on a CPU
SEEDS = (0, 1, 2)
PICTURES_SEED = 1
SCALE_LEARNING_RATE = 1e-2
EMA = 0.998  # of every kind, so short a training ends before a longer average would show it
MODULES = {  # (timed, {width: how many times the demonstration's})
    "with time": (True, {}), "without": (False, {}),
    "without, wide": (False, {"stem_0": 2, "stem_1": 2, "width_0": 2, "width_1": 2, "width_2": 2}),
    "without, narrow stem": (False, {"stem_1": 0.75}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("canny", "super_resolution"))
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--modules", nargs="+", choices=MODULES, default=list(MODULES))
    options = parser.parse_args()
    harness.enter()

    import numpy as np

    from controlnext_core.families import FAMILIES
    from controlnext_core.module import new_module
    from demo_model import control, provide
    from demo_model.agreement import share_of_the_way
    from demo_model.bases import BASES
    from demo_model.drawings import load_drawings, load_held_out
    from demo_model.measure import agreements

    kind, base = options.kind, BASES["sd3"]
    folder = harness.environment.cache_folder() / "demo_model"
    pack, drawn = harness.Pack(), load_drawings(folder)
    left_out = drawn.training[TRAINED_ON:]
    drawn = dataclasses.replace(drawn, held_out=np.concatenate([drawn.held_out, left_out]))
    comfyui = pack.models.parent
    demonstration = pack.demonstration(*(part[:DRAWINGS] for part in load_held_out(provide.WEIGHTS)), base=base.name)
    edges = demonstration.edges(demonstration.images)

    if kind == "canny":
        controls, uncontrolled = edges, demonstration.draw(PICTURES_SEED)
    else:
        controls = demonstration.smaller(demonstration.images)
        uncontrolled = demonstration.larger(controls)
    off, ceiling = (agreements(demonstration.edges(pictures), edges, kind)
                    for pictures in (uncontrolled, demonstration.ceiling()))

    def fresh(timed: bool, times: dict[str, float], seed: int) -> dict:
        family = dataclasses.replace(FAMILIES[base.family], timed=timed)
        widths = {name: int(times.get(name, 1) * width) for name, width in control.WIDTHS.items()}
        return new_module(family, seed, **widths, out=base.width).state_dict()

    def measure(module: str, seed: int, steps: int) -> dict:
        """Train on to so many steps, and draw."""
        trained = control.train(pack.run, comfyui, drawings=drawn, base=base, kind=kind, steps=steps,
                                encoded=folder / f"sd3_encoded_{TRAINED_ON}.pt", seed=seed,
                                start=fresh(*MODULES[module], seed), scale_learning_rate=SCALE_LEARNING_RATE, ema=EMA,
                                save_every=options.steps[0], batch_size=BATCH)
        pack.put_control(trained, base.prefix, kind)
        agreement = agreements(demonstration.edges(demonstration.draw(PICTURES_SEED, kind, controls)), edges, kind)
        with open(max(comfyui.glob("output/**/*_losses.csv"), key=lambda file: file.stat().st_mtime)) as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file)]
        return {"F1": agreement, "share": share_of_the_way(agreement, off, ceiling), "loss": sum(losses) / len(losses)}

    kept = harness.FOLDER / "results" / f"without_time_{kind}.json"
    found = json.loads(kept.read_text())["found"] if kept.exists() else {}
    for seed in options.seeds:
        for module in options.modules:
            names = {steps: f"{module}, seed {seed}, {steps} steps" for steps in options.steps}
            if set(names.values()) <= found.keys():
                continue
            shutil.rmtree(comfyui / "output" / "controlnext_training", ignore_errors=True)
            for steps, name in names.items():
                found[name] = measure(module, seed, steps)
                table = [[name, f"{one['F1']:.3f}", f"{one['share']:.2f}", f"{one['loss']:.4f}"]
                         for name, one in found.items()]
                harness.report(f"without_time_{kind}", f"F1 of edges of {DRAWINGS} held-out drawings; without control "
                               f"{off:.3f}, the VAE's own {ceiling:.3f}", ["module", "F1", "share", "mean loss"], table,
                               {"off": off, "ceiling": ceiling, "found": found})


if __name__ == "__main__":
    main()
