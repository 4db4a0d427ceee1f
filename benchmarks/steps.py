"""The cost of control in a sampling step: ours, the reference's way, and ComfyUI's own ControlNet, on top of the UNet.

    python benchmarks/steps.py                              the standard cases of this machine, one after the other
    python benchmarks/steps.py --base sd15 --size 512       one case

All ways run in one process, in turn, through ComfyUI's own sampler on its own UNet with both guidance halves, and are
compared round by round. Weights are random: the figures do not depend on them. On a GPU the UNet is in float16 and in
full depth; on a CPU in float32, SDXL with its transformers cut to one block.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import harness
from watch import ControlWatch

if TYPE_CHECKING:
    import torch

CPU_CASES = ("--base sd15 --size 256", "--base sd15 --size 512", "--base sdxl --size 512",
             "--base svd --size 256 --frames 4")
SIZES = {"sd15": "512", "sdxl": "1024", "svd": "1024x576"}  # the standard ones
ALONE, FIRST, SECOND, REFERENCE, NATIVE = ("UNet alone", "ControlNeXt, first run", "ControlNeXt, second run",
                                           "reference's way", "native ControlNet")
HEADER = ["way", "FLOPs/step", "over UNet", "median step", "over UNet, by pairs", "in CPU time", "control's own time",
          "of the reference's", "peak memory"]
OF_THE_UNET = ("way", "FLOPs/step", "median step", "peak memory")  # columns that the UNet alone has
GPU_CASES = tuple(f"--base {base}{compiled}" for compiled in ("", " --compile") for base in ("sd15", "sdxl", "svd"))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", choices=SIZES, help="(default: the standard cases)")
    parser.add_argument("--size", default=None, metavar="WIDTHxHEIGHT",
                        help="size of the picture (default: 512 for sd15, 1024 for sdxl, 1024x576 for svd)")
    parser.add_argument("--frames", type=int, default=25, help="frames of the video, for svd (default: 25)")
    parser.add_argument("--steps", type=int, default=20,
                        help="steps of the sampling that the first run's image part is spread over (default: 20)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--steps-per-round", type=int, help="timed for each way, at least 2 (default: 2, on a GPU 10)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="dtype of the UNet and the control")
    parser.add_argument("--depth", choices=("full", "cut"), help="depth of SDXL's transformers")
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile the UNet, as ComfyUI's TorchCompileModel node does")
    return parser.parse_args()


@dataclass(frozen=True)
class Case:
    """One case to measure, from the arguments and the defaults that suit this machine.

    Attributes:
        frames: a video's, 1 for a picture.
        cut: SDXL's transformers are one block deep.
        compiled: torch.compile compiles the UNet.
        steps: number of steps of the sampling that the first run's image part is spread over.
        count: steps that are run and timed: the first one, with the image part, and others.
    """

    base: str
    width: int
    height: int
    frames: int
    dtype: torch.dtype
    cuda: bool
    cut: bool
    compiled: bool
    steps: int
    count: int

    @property
    def video(self) -> bool:
        return self.base == "svd"

    @property
    def name(self) -> str:
        """The name of the file of results."""
        name = f"steps_{self.base}_{self.width}x{self.height}{f'x{self.frames}' if self.video else ''}"
        return name + ("_cuda" if self.cuda else "_cpu") + ("_compile" if self.compiled else "")

    @property
    def title(self) -> str:
        picture = f"{self.width}x{self.height}" + (f", {self.frames} frames" if self.video else "")
        return (f"{self.base}, {picture}, {str(self.dtype).removeprefix('torch.')}{', cut depth' if self.cut else ''}"
                f"{', torch.compile' if self.compiled else ''}, both guidance halves")


def case_of(arguments: argparse.Namespace) -> Case:
    import torch
    cuda, base = torch.cuda.is_available(), arguments.base
    width, height = (int(side) for side in ((arguments.size or SIZES[base]).split("x") * 2)[:2])
    return Case(base=base, width=width, height=height, frames=arguments.frames if base == "svd" else 1,
                dtype=getattr(torch, arguments.dtype or ("float16" if cuda else "float32")), cuda=cuda,
                cut=base == "sdxl" and (arguments.depth or ("full" if cuda else "cut")) == "cut",
                compiled=arguments.compile, steps=arguments.steps,
                count=max(2, arguments.steps_per_round or (10 if cuda else 2)))


class Watch(ControlWatch):
    """A watch for the seconds that a way of control adds to a sampling's steps."""

    def __init__(self):
        import torch
        self.synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        self.added = 0.0

    @contextlib.contextmanager
    def adding(self, sign: int = 1):
        self.synchronize()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.synchronize()
            self.added += sign * (time.perf_counter() - start)


class Bench:
    """The UNet of a case, and all ways to control it: {way: (MODEL, (positive, negative))}.

    Everything that control does in a step is under the watch.
    """

    def __init__(self, case: Case):
        self.case, self.pack, self.watch = case, harness.Pack(), Watch()
        self.bare = self.make_unet()
        self.controlnext = self.pack.controlnext(case.base)
        self.ways = self.make_ways()
        self.watch_ways()

    def make_unet(self):
        from comfy.patcher_extension import WrappersMP
        bare = harness.unet(self.case.base, self.case.dtype, self.case.cut)
        if self.case.compiled:
            from comfy_api.torch_helpers import set_torch_compile_wrapper
            set_torch_compile_wrapper(bare, backend="inductor")
        bare.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "outside", self.watch.outside)
        bare.wrappers[WrappersMP.APPLY_MODEL] = {"outside": [self.watch.outside],
                                                 **bare.wrappers[WrappersMP.APPLY_MODEL]}  # the first is the outermost
        return bare

    @cached_property
    def latent(self) -> torch.Tensor:
        import torch
        return torch.zeros(self.case.frames, 4, self.case.height // 8, self.case.width // 8)

    def make_ways(self) -> dict[str, tuple]:
        import torch
        import ways
        from sampling import cond
        case = self.case
        image = torch.rand(case.frames, case.height, case.width, 3, generator=torch.Generator().manual_seed(2))
        extra = {"concat_latent_image": torch.randn(1, *self.latent.shape[1:])} if case.video else {}
        conds = cond(self.bare, 0, tokens=77, **extra), cond(self.bare, 1, tokens=77, **extra)

        controlled = self.pack.run("ControlNeXtApply", model=self.bare, controlnext=self.controlnext, image=image,
                                   strength=1.0, start_percent=0.0, end_percent=1.0)
        reference = ways.with_reference_control(self.pack, self.bare, controlled)
        made = {ALONE: (self.bare, conds), FIRST: (controlled, conds), SECOND: (controlled, conds),
                REFERENCE: (reference, conds)}
        if not case.video:  # ComfyUI has none for SVD
            native = ways.native_controlnet(self.bare, case.dtype)
            made[NATIVE] = self.bare, ways.with_native_control(conds, native, image)
        return made

    def watch_ways(self) -> None:
        import comfy.controlnet
        import ways
        from comfy.patcher_extension import WrappersMP
        for model in dict.fromkeys(model for model, _ in self.ways.values()):
            model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "inside", self.watch.inside)
        if not self.case.compiled:  # a watch inside the compiled UNet would cut its graph in pieces
            for kind in (self.pack.module("nodes.runtime.injection").Injection, ways.ReferenceControl):
                kind.__call__ = self.watch.watched(kind.__call__)
        native = comfy.controlnet.ControlNet
        native.get_control = self.watch.watched(native.get_control)

    def run(self, way: str, flops: bool = False) -> list[dict]:
        """{seconds, cpu, added, flops, output} of each of the first ``count`` steps of a sampling."""
        import comfy.sample
        import comfy.samplers
        import torch
        case, results = self.case, []
        model, (positive, negative) = self.ways[way]
        if way == FIRST:
            self.controlnext.loaded.features.clear()
        sigmas = comfy.samplers.calculate_sigmas(self.bare.get_model_object("model_sampling"), "normal", case.steps)
        noise = torch.randn(self.latent.shape, generator=torch.Generator().manual_seed(4))

        def sampler(apply, x, sigmas, extra_args=None, **_):
            for sigma in sigmas[:-1]:
                results.append(self.step(lambda at=sigma: apply(x, at.expand(len(x)), **extra_args), flops))
            return x
        with torch.inference_mode():
            comfy.sample.sample_custom(model, noise, cfg=7.0, sampler=comfy.samplers.KSAMPLER(sampler),
                                       sigmas=sigmas[:case.count + 1], positive=positive, negative=negative,
                                       latent_image=self.latent, disable_pbar=True, seed=1)
        return results

    def step(self, apply: Callable[[], torch.Tensor], flops: bool) -> dict:
        """{seconds, cpu, added, flops, output} of one step."""
        self.watch.added = 0.0
        with flop_counter() if flops else contextlib.nullcontext() as counter:
            self.watch.synchronize()
            start, cpu = time.perf_counter(), time.process_time()
            output = apply()
            self.watch.synchronize()
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        return {"seconds": seconds, "cpu": cpu, "added": self.watch.added, "output": output,
                "flops": counter.get_total_flops() if flops else None}

    def per_step(self, results: list[dict], what: str) -> float:
        """One figure for a step of a whole sampling: the surplus of its first step is spread over all."""
        first, *later = [result[what] for result in results]
        return (first + (self.case.steps - 1) * statistics.median(later)) / self.case.steps


def flop_counter():
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
    return FlopCounterMode(display=False, custom_mapping={
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            lambda q, k, v, *args, out_shape=None, **kwargs: sdpa_flop_count(q, k, v)})


def warm_up(bench: Bench) -> tuple[dict[str, dict], float]:
    """One untimed call of each way, which counts: a row of the figures for each, and how far two ways are apart.

    That is the largest difference of our first step's result from the reference's, as a share of its std.
    """
    compiled, figures, outputs = bench.case.compiled, {}, {}
    for way in bench.ways:
        results = bench.run(way, flops=not compiled)
        outputs[way] = results[0]["output"]
        figures[way] = {"flops": None if compiled else bench.per_step(results, "flops"),
                        "seconds": [], "cpu": [], "added": [], "peak_memory": []}
    apart = (outputs[FIRST] - outputs[REFERENCE]).abs().max() / outputs[REFERENCE].std()
    return figures, float(apart)


def order_of(ways: list[str], number: int) -> list[str]:
    """All ways in the order of a round: every second one backwards, but the first run, which fills the caches."""
    order = ways if number % 2 == 0 else ways[::-1]
    if order.index(SECOND) < order.index(FIRST):
        order.remove(FIRST)
        order.insert(order.index(SECOND), FIRST)
    return order


def measure(bench: Bench, figures: dict[str, dict], rounds: int) -> None:
    """Add the figures of each round to those of each way."""
    for number in range(rounds):
        for way in order_of(list(bench.ways), number):
            with harness.PeakMemory() as memory:
                results = bench.run(way)
            figures[way]["peak_memory"].append(memory.bytes)
            for what in ("seconds", "cpu", "added"):
                figures[way][what].append(bench.per_step(results, what))
        print(f"Round {number + 1} of {rounds}: {figures[ALONE]['seconds'][-1]:.3f} s a step of the UNet alone",
              flush=True)


def overheads(row: dict, alone: dict, what: str) -> list[float]:
    """The surplus that a way takes over the UNet alone, as a share of that, round by round."""
    return [one / plain - 1 for one, plain in zip(row[what], alone[what], strict=True)]


def compare(figures: dict[str, dict]) -> None:
    """Add to the figures of each way those beside the UNet alone and beside the reference's way."""
    alone, reference = figures[ALONE], statistics.median(figures[REFERENCE]["added"])
    for row in figures.values():
        row["overhead"] = statistics.median(overheads(row, alone, "seconds"))
        row["cpu_overhead"] = statistics.median(overheads(row, alone, "cpu"))
        row["added_median"] = statistics.median(row["added"])
        row["added_of_reference"] = row["added_median"] / reference


def cells(way: str, row: dict, alone: dict) -> list[str]:
    """One row of the table, under HEADER."""
    flops = [f"{row['flops'] / 1e12:.3f} T", f"{row['flops'] / alone['flops'] - 1:+.2%}"] if row["flops"] else ["-", ""]
    pairs = overheads(row, alone, "seconds")

    shown = [
        way,
        *flops,
        f"{statistics.median(row['seconds']) * 1000:.1f} ms",
        f"{row['overhead']:+.1%} ({min(pairs):+.1%} to {max(pairs):+.1%})",
        f"{row['cpu_overhead']:+.1%}",
        f"{row['added_median'] * 1000:.1f} ms",
        f"{row['added_of_reference']:.3f}",
        f"{statistics.median(row['peak_memory']) / 2 ** 20:.0f} MB",
    ]

    if way == ALONE:
        return [cell if name in OF_THE_UNET else "" for name, cell in zip(HEADER, shown, strict=True)]
    return shown


def run_standard_cases(rounds: int) -> None:
    """Each in a process of its own, for its memory."""
    import torch
    for case in GPU_CASES if torch.cuda.is_available() else CPU_CASES:
        subprocess.run([sys.executable, __file__, *case.split(), "--rounds", str(rounds)], check=True)


def main() -> None:
    arguments = parse_arguments()
    harness.enter()
    if arguments.base is None:
        return run_standard_cases(arguments.rounds)
    started, case = time.perf_counter(), case_of(arguments)
    bench = Bench(case)
    print(f"Made in {time.perf_counter() - started:.0f} s", flush=True)

    figures, apart = warm_up(bench)
    load_before = load_average()
    measure(bench, figures, arguments.rounds)
    compare(figures)

    alone = figures[ALONE]
    harness.report(case.name, f"{case.title}, {arguments.rounds} rounds, first run of {case.steps} steps", HEADER,
                   [cells(way, row, alone) for way, row in figures.items()],
                   {"arguments": vars(arguments), "deviation_from_reference": apart,
                    "load": [load_before, load_average()], "ways": figures})
    print(f"Largest difference of our result from the reference's way: {apart:.1e} of its std. The UNet alone took "
          f"{min(alone['seconds']):.3f} to {max(alone['seconds']):.3f} s.")


def load_average() -> tuple | None:
    return os.getloadavg() if hasattr(os, "getloadavg") else None


if __name__ == "__main__":
    main()
