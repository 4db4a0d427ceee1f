"""How well a model of the demonstration follows its control, on the drawings that its training never saw.

    python benchmarks/control.py
    python benchmarks/control.py --base sd3

For Canny edges (F1, an edge counts as found within one pixel) and, with the SD1.5, for the drawn region (IoU): without
control, at strengths 0.5 and 1, with another drawing's control, and, with the SD1.5, with the style LoRA. The share of
the way goes from what the same model draws without control (0) to what its VAE makes of the drawing itself (1).
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import harness

if TYPE_CHECKING:
    import numpy as np
    import torch

    from demo_model.measure import Demonstration

SEEDS = (1, 2, 3)
TURN = 7  # another drawing: so many places further
SHEET = 16  # drawings in the picture of them
KINDS = {"sd15": ("canny", "mask"), "sd3": ("canny",)}
STYLED = ("sd15",)  # bases that the style LoRA is for
HEADER = ["control", "strength", "off", "on", "ceiling", "share"]


class Drawn:
    """The pictures that a model of the demonstration draws: without control, and under every kind that it has.

    Attributes:
        models: {addition to a case's name: MODEL}, the bare one, for which None stands, and the one with the LoRA.
        bare: {(seed, model): IMAGE} without control.
        sheet: rows of pictures, those of the first seed.
    """

    def __init__(self, demonstration: Demonstration, seeds: list[int], styled: bool):
        self.demonstration, self.seeds = demonstration, seeds
        self.models = {"": None} | ({", LoRA": demonstration.styled()} if styled else {})
        self.bare = {(seed, name): demonstration.draw(seed, model=model)
                     for seed in seeds for name, model in self.models.items()}
        self.reconstructed = demonstration.ceiling()
        self.sheet: list[torch.Tensor] = [self.bare[seeds[0], ""]]

    def measure(self, kind: str) -> dict:
        """{on, off: {case: agreement for each seed}, ceiling, share of the way: {case: share}} of a kind of control."""
        import numpy as np
        import torch

        from demo_model.agreement import share_of_the_way
        from demo_model.measure import agreements
        see = {"canny": self.demonstration.edges, "mask": self.demonstration.regions}[kind]
        controls = see(self.demonstration.images)
        others = np.roll(controls, TURN, axis=0)
        ceiling = agreements(see(self.reconstructed), controls, kind)
        self.sheet.append(torch.from_numpy(controls)[..., None].expand(-1, -1, -1, 3))

        def agree(pictures: torch.Tensor, wanted: np.ndarray) -> float:
            return agreements(see(pictures), wanted, kind)

        cases = {"0.5": (controls, 0.5, ""), **{f"1{name}": (controls, 1.0, name) for name in self.models},
                 "another's": (others, 1.0, "")}
        on, off = {name: [] for name in cases}, {name: [] for name in cases}
        for seed in self.seeds:
            for name, (wanted, strength, model) in cases.items():
                pictures = self.demonstration.draw(seed, kind, wanted, strength, self.models[model])
                on[name].append(agree(pictures, wanted))
                off[name].append(agree(self.bare[seed, model], wanted))
                if seed == self.seeds[0]:
                    self.sheet.append(pictures)

        shares = {name: share_of_the_way(float(np.mean(on[name])), float(np.mean(off[name])), ceiling)
                  for name in cases}
        return {"on": on, "off": off, "ceiling": ceiling, "share of the way": shares}


def rows_of(kind: str, result: dict) -> list[list[str]]:
    """A kind's rows of the table, under HEADER."""
    import numpy as np
    return [[kind, name, f"{np.mean(result['off'][name]):.3f}", f"{np.mean(result['on'][name]):.3f}",
             f"{result['ceiling']:.3f}", f"{share:.2f}"] for name, share in result["share of the way"].items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", choices=KINDS, default="sd15", help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    options = parser.parse_args()
    harness.enter()

    from demo_model import provide
    from demo_model.drawings import load_held_out
    drawings, captions = load_held_out(provide.WEIGHTS)
    demonstration = harness.Pack().demonstration(drawings, captions, base=options.base)
    drawn = Drawn(demonstration, list(options.seeds), options.base in STYLED)
    results, table = {}, []
    for kind in KINDS[options.base]:
        results[kind] = drawn.measure(kind)
        table += rows_of(kind, results[kind])
        print(harness.table(HEADER, table), flush=True)

    name = "control" if options.base == "sd15" else f"control_{options.base}"
    harness.report(name, f"Agreement with control of the {options.base}, {len(drawings)} held-out drawings, "
                   f"{len(options.seeds)} seeds", HEADER, table,
                   {"seeds": list(options.seeds), "captions": captions, **results})
    harness.save_sheet(name, [row[:SHEET] for row in drawn.sheet])


if __name__ == "__main__":
    main()
