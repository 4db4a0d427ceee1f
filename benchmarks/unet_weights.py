"""The cost of applying full-size UNet weights: time, and memory apart into the process's own and mapped files.

    python benchmarks/unet_weights.py --base svd     3 GB that replace every tensor
    python benchmarks/unet_weights.py --base sdxl    205 MB of differences for 70 layers

The base model and the file are written with random weights in half precision to a temporary folder, by a process of
its own, and loaded by ComfyUI's own node and by Load ControlNeXt UNet Weights. Linux only.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import harness

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

NAME = "unet.safetensors"


def write(base: str, models: Path) -> None:
    """Write two files: the base UNet, and weights for it as the release of its kind has them."""
    import torch
    from models import unet_model
    from safetensors.torch import save_file

    from controlnext_core.unet_keys import diffusers_to_ldm

    model = unet_model(base, torch.float16, **harness.DEPTHS.get(base, {}))
    weights = model.model.diffusion_model.state_dict()
    for weight in weights.values():
        weight.normal_()
    save_file({f"model.diffusion_model.{key}": weight for key, weight in weights.items()},
              models / "diffusion_models" / NAME)

    names = {key: name for name, key in diffusers_to_ldm(weights).items()}
    if base == "sdxl":
        weights = {key: weight for key, weight in weights.items() if "attn2.to_out" in key}
    for weight in weights.values():
        weight.mul_(0.02 if base == "sdxl" else 1.02)
    save_file({names[key]: weight for key, weight in weights.items()}, models / "controlnext" / NAME)


class Stage:
    """Time and memory of one stage: the most that it takes while it runs, and the memory at its end."""

    def __enter__(self):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts again
        self._done, self._own_peak = threading.Event(), 0
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        self._start, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_):
        self.seconds, self.cpu_seconds = time.perf_counter() - self._start, time.process_time() - self._cpu
        self._done.set()
        self._watcher.join()
        harness.give_back_memory()
        self.bytes = {"own": harness.memory_status("RssAnon"), "own, at most": self._own_peak,
                      "mapped files": harness.memory_status("RssFile"), "all, at most": harness.memory_status("VmHWM")}

    def _watch(self):
        while not self._done.wait(0.005):
            self._own_peak = max(self._own_peak, harness.memory_status("RssAnon"))


def measure_stages(pack: harness.Pack) -> tuple[dict[str, Stage], ModelPatcher]:
    """(the stages from nothing to a model whose weights are changed, the base MODEL)."""
    import comfy.model_management
    stages = {"begin": Stage(), "base model loaded": Stage(), "Load ControlNeXt UNet Weights": Stage(),
              "weights applied": Stage()}
    begin, base_loaded, node, applied = stages.values()

    with begin:
        pass
    with base_loaded:
        base = pack.run("UNETLoader", unet_name=NAME, weight_dtype="default")
        comfy.model_management.load_models_gpu([base])
    with node:
        model = load_weights(pack, base)
    with applied:
        comfy.model_management.load_models_gpu([model])
    return stages, base


def measure_rounds(pack: harness.Pack, base: ModelPatcher, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds, and seconds of CPU time, of loading and applying the file to the loaded model, round by round."""
    import comfy.model_management
    added, added_cpu = [], []
    for _ in range(rounds):
        comfy.model_management.load_models_gpu([base])
        start, cpu = time.perf_counter(), time.process_time()
        model = load_weights(pack, base)
        comfy.model_management.load_models_gpu([model])
        added.append(time.perf_counter() - start)
        added_cpu.append(time.process_time() - cpu)
    return added, added_cpu


def load_weights(pack: harness.Pack, base: ModelPatcher) -> ModelPatcher:
    return pack.run("ControlNeXtUNetLoader", model=base, unet_name=NAME, strength=1.0, mode="auto")


def cells(name: str, stage: Stage) -> list[str]:
    """A stage's row of the table."""
    return [name, f"{stage.seconds:.2f} s", f"{stage.cpu_seconds:.2f} s",
            *(f"{value / 2 ** 20:.0f} MB" for value in stage.bytes.values())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", choices=("svd", "sdxl"), default="svd")
    parser.add_argument("--rounds", type=int, default=5,
                        help="rounds of loading and applying, for their time (default: 5)")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    harness.enter("--fp16-unet")  # a GPU's default
    if arguments.write:
        return write(arguments.base, arguments.write)

    import folder_paths
    pack, models = harness.Pack(), Path(folder_paths.models_dir)
    (models / "diffusion_models").mkdir()
    subprocess.run([sys.executable, __file__, "--base", arguments.base, "--write", models], check=True)
    size = {folder: (models / folder / NAME).stat().st_size for folder in ("diffusion_models", "controlnext")}
    stages, base = measure_stages(pack)
    added, added_cpu = measure_rounds(pack, base, arguments.rounds)

    figures = {name: {"seconds": stage.seconds, "cpu_seconds": stage.cpu_seconds, "bytes": stage.bytes}
               for name, stage in stages.items()}
    harness.report(f"unet_weights_{arguments.base}",
                   f"{arguments.base}: a file of {size['controlnext'] / 1e6:.0f} MB on a model of "
                   f"{size['diffusion_models'] / 1e6:.0f} MB, both float16",
                   ["after", "time", "CPU time", *stages["begin"].bytes],
                   [cells(name, stage) for name, stage in stages.items()],
                   {"sizes": size, "stages": figures, "added_seconds": added, "added_cpu_seconds": added_cpu})
    print(f"Loading the file and applying it to the loaded model, {arguments.rounds} times: median "
          f"{statistics.median(added):.2f} s ({min(added):.2f} to {max(added):.2f}), CPU time "
          f"{statistics.median(added_cpu):.2f} s.")


if __name__ == "__main__":
    main()
