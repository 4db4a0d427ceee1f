"""What ControlNeXt Dataset takes: time and disk to encode, host memory by the number of pictures, waiting.

    python benchmarks/dataset.py
    python benchmarks/dataset.py --counts 200,2000

Encoding and waiting are those of the demonstration's SD3, with its VAE and its text encoder. Memory is that of a
process of its own for each number of pictures: it encodes so many small files, each with a caption of its own, and
trains a small SD3 on them. There VAE and text encoder are stand-ins that compute next to nothing, so that 20 000 end
soon. Linux alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import harness

PICTURES, CAPTIONS = 200, 16  # that are encoded by the demonstration's VAE and text encoder
SMALL = 64  # pixels, side of the pictures in the measurement of memory
BATCH = 8
STEPS = 30
MB = 2 ** 20


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", default="200,20000", metavar="N,N",
                        help="numbers of pictures whose memory is compared (default: 200,20000)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of the trainings (default: {STEPS})")
    parser.add_argument("--memory-of", type=int, metavar="N", help=argparse.SUPPRESS)  # in a process of its own
    return parser.parse_args()


def write_pictures(folder: Path, drawings, captions: list[str], numbers: range) -> None:
    """Pictures of these numbers, (N, H, W, 3) drawings, each moved another way, with captions beside them."""
    import cv2
    import numpy as np
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        shifted = np.roll(drawings[number % len(drawings)], number // len(drawings), axis=1)
        cv2.imwrite(str(folder / f"{number:05}.png"), shifted[..., ::-1])
        (folder / f"{number:05}.txt").write_text(captions[number % len(captions)], encoding="utf-8")


def timed(function: Callable, *args) -> tuple[float, object]:
    """(seconds of a call, what it returns)."""
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


class SmallVae:
    """In place of a VAE: a picture made an eighth as large, in SD3's 16 channels."""

    def encode(self, pixels):
        from torch.nn.functional import avg_pool2d
        return avg_pool2d(pixels.movedim(-1, 1), 8).repeat(1, 6, 1, 1)[:, :16]


class SmallText:
    """In place of a text encoder: a text is one token."""

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str) -> list:
        import torch
        return [[torch.full((1, 1, 4096), float(len(text))), {"pooled_output": torch.ones(1, 2048)}]]


def training(pack, model, dataset, steps: int):
    """(settings, data) of a training on a data set."""
    settings = pack.module("nodes.training.settings").TrainSettings(
        steps=steps, batch_size=BATCH, training_dtype="fp32", gradient_checkpointing=False, preview_every=0)
    return settings, pack.module("nodes.training.dataset").FolderData(dataset, model)


def host_peak(function: Callable, *args) -> tuple[int, object]:
    """(the most host memory of this process while a function ran, in bytes; what it returns). Linux alone."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    result = function(*args)
    return harness.memory_status("VmHWM"), result


def memory_of(count: int, steps: int) -> dict:
    """Host memory of encoding so many pictures and of training on them, above what the process had before."""
    import folder_paths
    import numpy as np
    from models import small_sd3
    pack, model = harness.Pack(), small_sd3()
    dataset = pack.module("nodes.training.dataset")
    session = pack.module("nodes.training.session")
    folder = Path(folder_paths.get_input_directory()) / "pictures"
    drawings = np.random.default_rng(0).integers(0, 256, (SMALL, SMALL, SMALL, 3), dtype=np.uint8)
    write_pictures(folder, drawings, [f"caption {number}" for number in range(count)], range(count))
    cache, settings = str(folder.parent / "cache"), dataset.DataSettings(str(folder), SMALL)

    def encode():
        return dataset.encode(settings, SmallVae(), SmallText(), cache, pack.module("controlnext_core.ranks").Ranks())

    def train(made) -> int:
        of_training, data = training(pack, model, made, steps)
        with session.Session(model, data, of_training) as running:
            for _ in range(steps):
                running.step()
            return harness.memory_status("VmRSS")

    harness.give_back_memory()
    before = harness.memory_status("VmRSS")
    encoding, (made, encoded, _) = host_peak(encode)
    assert encoded == len(made.rows) == count
    harness.give_back_memory()
    again, _ = timed(encode)
    peak, resident = host_peak(train, made)
    return {"pictures": count, "encoding": encoding - before, "training": peak - before, "resident": resident - before,
            "seconds_when_all_is_encoded": again}


def encoding(pack, drawings, captions: list[str], clip, vae) -> tuple[dict, object]:
    """(seconds and bytes of encoding the demonstration's pictures by the node, the data set)."""
    import folder_paths
    folder = Path(folder_paths.get_input_directory()) / "drawings"
    known = len(captions)

    def encode():
        return pack.run("ControlNeXtDataset", folder=folder.name, vae=vae, clip=clip, size=96, buckets=True,
                        control="canny", mask_threshold=0.5)

    write_pictures(folder, drawings, captions, range(known))
    with_captions, _ = timed(encode)
    write_pictures(folder, drawings, captions, range(known, known + PICTURES))
    (alone, made), (again, _) = timed(encode), timed(encode)
    cache = Path(folder_paths.get_output_directory()) / "controlnext_datasets" / folder.name
    return {"seconds": alone - again, "seconds_when_all_is_encoded": again,
            "seconds_of_a_caption": (with_captions - again) / known - (alone - again) / PICTURES,
            "picture_bytes": bytes_in(cache / "pictures") / len(made.rows),
            "caption_bytes": bytes_in(cache / "captions") / (known + 1)}, made  # and the empty one


def waiting(pack, model, made, steps: int, ahead: bool) -> dict:
    """Seconds of steps, and of those the seconds in which they waited for samples, without the first step.

    Args:
        ahead: samples are read ahead, as they are in every training; otherwise each is read when it is asked for.
    """
    settings, data = training(pack, model, made, steps)
    sample, waited = data.sample, []

    def watched(row: int):
        seconds, result = timed(sample, row)
        waited.append(seconds)
        return result

    data.sample = watched
    if not ahead:
        data.read_ahead = lambda rows: data._ready.clear()
    with pack.module("nodes.training.session").Session(model, data, settings) as session:
        session.step()
        waited.clear()
        seconds, _ = timed(lambda: [session.step() for _ in range(steps - 1)])
    return {"seconds": seconds, "waited": sum(waited)}


def main() -> None:
    arguments = parse_arguments()
    harness.enter()
    if arguments.memory_of:
        return print(json.dumps(memory_of(arguments.memory_of, arguments.steps)))
    memory = []
    for count in map(int, arguments.counts.split(",")):
        command = [sys.executable, __file__, "--memory-of", str(count), "--steps", str(arguments.steps)]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        memory.append(json.loads(said.splitlines()[-1]))
        print(memory[-1], flush=True)

    from demo_model import provide
    from demo_model.drawings import load_held_out
    pack = harness.Pack()
    drawings, captions = load_held_out(provide.WEIGHTS)
    demonstration = pack.demonstration(drawings[:1], captions[:1], base="sd3")
    encoded, made = encoding(pack, drawings, captions[:CAPTIONS], demonstration.clip, demonstration.vae)
    waits = {name: waiting(pack, demonstration.model, made, arguments.steps, ahead)
             for name, ahead in (("read ahead", True), ("read when asked for", False))}

    rows = [
        [f"encoding {PICTURES} pictures of 96x96", f"{PICTURES / encoded['seconds']:.1f} a second"],
        ["encoding a caption", f"{encoded['seconds_of_a_caption']:.2f} s"],
        ["the node when all of it is encoded", f"{encoded['seconds_when_all_is_encoded']:.2f} s"],
        ["cache of a picture, of a caption",
         f"{encoded['picture_bytes'] / 1000:.1f} kB, {encoded['caption_bytes'] / 1000:.0f} kB"],
        *([f"memory for {one['pictures']} pictures: encoding, training, at its end",
           ", ".join(f"{one[name] / MB:.0f} MB" for name in ("encoding", "training", "resident"))] for one in memory),
        *([f"looking through {one['pictures']} pictures when all of them are encoded",
           f"{one['seconds_when_all_is_encoded']:.1f} s"] for one in memory),
        *([f"share of a step waiting for a batch of {BATCH}, {name}",
           f"{one['waited'] / one['seconds']:.2%} of {1000 * one['seconds'] / (arguments.steps - 1):.0f} ms"]
          for name, one in waits.items()),
    ]
    harness.report("dataset", "A data set from disk", ["", ""], rows,
                   {"encoding": encoded, "memory": memory, "waiting": waits})


if __name__ == "__main__":
    main()
