"""How recognisable the pictures are that the demonstration's model draws by a prompt alone, without control.

    python benchmarks/drawings.py

For 64 captions of its training, a picture is recognised where no training drawing is more like it than the caption's
own. Needs npm for the drawings.
"""

from __future__ import annotations

import world

PROMPTS = 64
SEED = 1
CFG = 3.0
ROW = 16  # pictures
COARSE = 24  # pixels a side at which pictures are compared


def main() -> None:
    world.enter("--bf16-unet")  # twice as fast on a CPU
    import numpy as np
    import torch

    from demo_model.samples import UPRIGHT, varied_drawings
    from demo_model.world import load_world

    def coarse(images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(images, (COARSE, COARSE), mode="area").flatten(1)

    drawn = load_world(world.environment.cache_folder() / "demo_model")
    prompts = drawn.training[::len(drawn.training) // PROMPTS][:PROMPTS]
    captions = [drawn.captions[index] for index in prompts]
    pictures = world.Pack().demonstration(drawn.drawings[prompts], captions, CFG).draw(SEED)
    varied = varied_drawings(drawn)
    known = torch.cat([coarse(varied[index][:UPRIGHT]) for index in drawn.training])
    distances = torch.cdist(coarse(pictures.movedim(-1, 1).float()), known).unflatten(1, (-1, UPRIGHT)).amin(dim=2)
    own = distances.gather(1, torch.from_numpy(np.searchsorted(drawn.training, prompts))[:, None])
    ranks = (distances < own).sum(dim=1)
    shares = {f"among the {most} most alike": (ranks < most).float().mean().item() for most in (1, 5, 20)}
    title = f"Pictures of {PROMPTS} captions whose own drawing is the most alike of {distances.shape[1]}"
    world.report("drawings", title, list(shares), [[f"{share:.0%}" for share in shares.values()]],
                 {"captions": captions, "ranks": ranks.tolist(), "cfg": CFG})
    world.save_sheet("drawings", pictures.split(ROW))


if __name__ == "__main__":
    main()
