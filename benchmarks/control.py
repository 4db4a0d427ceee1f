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
    import os
    import sys
    from pathlib import Path

    import folder_paths
    import numpy as np
    sys.path.append(str(world.REPOSITORY))  # last, since ComfyUI has a module `nodes` of its own
    from demo_model import provide
    from demo_model.agreement import share_of_the_way
    from demo_model.measure import Demonstration, agreements
    from demo_model.world import load_held_out

    pack = world.Pack()
    provide.provide(Path(os.environ["COMFYUI_PATH"]), Path(folder_paths.models_dir))
    drawings, captions = load_held_out(world.REPOSITORY / "demo_model" / "weights")
    demonstration = Demonstration(pack.run, drawings, captions)
    results, rows = {}, []
    for kind, see in (("canny", demonstration.edges), ("mask", demonstration.regions)):
        controls = see(demonstration.images)
        others = np.roll(controls, TURN, axis=0)
        ceiling = agreements(see(demonstration.ceiling()), controls, kind)
        found = {"off": [], "0.5": [], "1": [], "off, LoRA": [], "1, LoRA": [], "another's": [], "off, another's": []}
        for seed in options.seeds:
            def follow(name: str, wanted=controls, **how) -> None:
                pictures = demonstration.draw(seed, kind, **how)  # noqa: B023
                found[name].append(agreements(see(pictures), wanted, kind))  # noqa: B023
                if name == "off":
                    found["off, another's"].append(agreements(see(pictures), others, kind))  # noqa: B023
                if seed == options.seeds[0]:  # noqa: B023
                    rows.append((pictures[:SHEET].numpy() * 255).round().astype(np.uint8))

            rows.append(np.repeat(np.uint8(255) * controls[:SHEET, ..., None], 3, axis=-1))
            follow("off")
            follow("0.5", controls=controls, strength=0.5)
            follow("1", controls=controls)
            styled = demonstration.styled()
            follow("off, LoRA", model=styled)
            follow("1, LoRA", controls=controls, model=styled)
            follow("another's", others, controls=others)
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
    import cv2
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
    cv2.imwrite(str(world.FOLDER / "results" / "control.jpg"), sheet[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])


if __name__ == "__main__":
    main()
