"""How recognisable the pictures are that the demonstration's models draw by a prompt alone, without control.

    python benchmarks/recognition.py

For 64 captions of its training, a picture is recognised where no training drawing is more like it than the caption's
own; distance is to that one, root mean square, at COARSE pixels. Needs npm for the drawings.
"""

from __future__ import annotations

import argparse

import harness

PROMPTS = 64
SEED = 1
CFG = 3.0
ROW = 16  # pictures
PLACES = (1, 5, 20)
COARSE = 24  # pixels a side at which pictures are compared


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    harness.enter()

    import numpy as np
    import torch

    from demo_model import provide
    from demo_model.bases import BASES
    from demo_model.drawings import load_drawings
    from demo_model.samples import Varied

    def coarse(images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(images, (COARSE, COARSE), mode="area").flatten(1)

    drawn = load_drawings(harness.environment.cache_folder() / "demo_model")
    prompts = drawn.training[::len(drawn.training) // PROMPTS][:PROMPTS]
    captions = [drawn.captions[index] for index in prompts]
    variations = BASES["sd15"].variations
    varied, upright = Varied(drawn, variations), variations[0]
    known = torch.cat([coarse(varied[index][:upright]) for index in drawn.training])
    pack, own = harness.Pack(), torch.from_numpy(np.searchsorted(drawn.training, prompts))[:, None]

    ranks, distances, rows = {}, {}, []
    for base in (made.name for made in provide.MADE):
        pictures = pack.demonstration(drawn.pictures[prompts], captions, CFG, base).draw(SEED)
        harness.save_sheet(f"recognition_{base}", pictures.split(ROW))
        apart = torch.cdist(coarse(pictures.movedim(-1, 1).float()), known).unflatten(1, (-1, upright)).amin(dim=2)
        ranks[base] = (apart < apart.gather(1, own)).sum(dim=1).tolist()
        distances[base] = (apart.gather(1, own) / known.shape[1] ** 0.5).mean().item()
        rows.append([base, *(f"{np.mean(np.array(ranks[base]) < most):.0%}" for most in PLACES),
                     f"{distances[base]:.3f}"])

    title = f"Pictures of {PROMPTS} captions whose own drawing is the most alike of {len(drawn.training)}"
    header = ["base", *(f"among the {most} most alike" for most in PLACES), "distance"]
    harness.report("recognition", title, header, rows,
                   {"captions": captions, "ranks": ranks, "distances": distances, "cfg": CFG})


if __name__ == "__main__":
    main()
