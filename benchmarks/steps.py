"""What control costs in a sampling step: ours, the reference's way, and ComfyUI's own ControlNet, beside the bare UNet.

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

import harness

CPU_CASES = ("--base sd15 --size 256", "--base sd15 --size 512", "--base sdxl --size 512",
             "--base svd --size 256 --frames 4")
GPU_CASES = tuple(f"--base {base}{compiled}" for compiled in ("", " --compile") for base in ("sd15", "sdxl", "svd"))


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", choices=("sd15", "sdxl", "svd"), help="(default: the standard cases)")
    parser.add_argument("--size", default=None, metavar="WIDTHxHEIGHT",
                        help="of the picture (default: 512 for sd15, 1024 for sdxl, 1024x576 for svd)")
    parser.add_argument("--frames", type=int, default=25, help="of the video, for svd (default: 25)")
    parser.add_argument("--steps", type=int, default=20,
                        help="of the sampling that the first run's image part is spread over (default: 20)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--steps-per-round", type=int, help="timed for each way, at least 2 (default: 2, on a GPU 10)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the UNet and the control")
    parser.add_argument("--depth", choices=("full", "cut"), help="of SDXL's transformers")
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile the UNet, as ComfyUI's TorchCompileModel node does")
    return parser.parse_args()


class Watch:
    """Times of a sampling's steps and of what a way of control adds to them."""

    def __init__(self, torch):
        self.synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        self.steps, self.added = [], 0.0

    @contextlib.contextmanager
    def adding(self, sign: int = 1):
        self.synchronize()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.synchronize()
            self.added += sign * (time.perf_counter() - start)

    def watched(self, function):
        def call(*args, **kwargs):
            with self.adding():
                return function(*args, **kwargs)
        return call

    def outside(self, executor, *args, **kwargs):
        """Outermost APPLY_MODEL wrapper, and ``inside`` the innermost: between them is what control adds."""
        with self.adding():
            return executor(*args, **kwargs)

    def inside(self, executor, *args, **kwargs):
        with self.adding(-1):
            return executor(*args, **kwargs)


def main() -> None:
    arguments = parse_arguments()
    harness.enter()
    if arguments.base is None:
        import torch
        for case in GPU_CASES if torch.cuda.is_available() else CPU_CASES:
            command = [sys.executable, __file__, *case.split(), "--rounds", str(arguments.rounds)]
            subprocess.run(command, check=True)  # in a process of its own, for its memory
        return
    import comfy.sample
    import comfy.samplers
    import torch
    import ways
    from comfy.patcher_extension import WrappersMP
    from sampling import cond
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    cuda = torch.cuda.is_available()
    base = arguments.base
    size = arguments.size or {"sd15": "512", "sdxl": "1024", "svd": "1024x576"}[base]
    width, height = (int(side) for side in (size.split("x") * 2)[:2])
    frames = arguments.frames if base == "svd" else 1
    dtype = getattr(torch, arguments.dtype or ("float16" if cuda else "float32"))
    cut = base == "sdxl" and (arguments.depth or ("full" if cuda else "cut")) == "cut"
    count = max(2, arguments.steps_per_round or (10 if cuda else 2))  # the first, with the image part, and others

    pack = harness.Pack()
    watch = Watch(torch)
    started = time.perf_counter()
    bare = harness.unet(base, dtype, cut)
    if arguments.compile:
        from comfy_api.torch_helpers import set_torch_compile_wrapper
        set_torch_compile_wrapper(bare, backend="inductor")
    bare.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "outside", watch.outside)
    bare.wrappers[WrappersMP.APPLY_MODEL] = {"outside": [watch.outside],
                                             **bare.wrappers[WrappersMP.APPLY_MODEL]}  # the first is the outermost
    image = torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(2))
    latent = torch.zeros(frames, 4, height // 8, width // 8)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(4))
    extra = {} if base != "svd" else {"concat_latent_image": torch.randn(1, 4, height // 8, width // 8)}
    conds = cond(bare, 0, **extra), cond(bare, 1, **extra)
    controlnext = pack.controlnext(base)
    controlled = pack.run("ControlNeXtApply", model=bare, controlnext=controlnext, image=image, strength=1.0,
                          start_percent=0.0, end_percent=1.0)
    reference = ways.with_reference_control(bare, controlled)
    for model in (bare, controlled, reference):
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "inside", watch.inside)
    if not arguments.compile:  # a watch inside the compiled UNet would cut its graph in pieces
        for kind in (pack.module("nodes.runtime.injection").Injection, ways.ReferenceControl):
            kind.__call__ = watch.watched(kind.__call__)
    comfy.controlnet.ControlNet.get_control = watch.watched(comfy.controlnet.ControlNet.get_control)
    features = controlnext.loaded.features
    all_ways = {"UNet alone": (bare, conds), "ControlNeXt, first run": (controlled, conds),
                "ControlNeXt, second run": (controlled, conds), "reference's way": (reference, conds)}
    if base != "svd":  # ComfyUI has none for SVD
        native = ways.native_controlnet(bare, dtype)
        all_ways["native ControlNet"] = bare, ways.with_native_control(conds, native, image)
    print(f"Made in {time.perf_counter() - started:.0f} s", flush=True)

    counter_options = {"display": False, "custom_mapping": {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            lambda q, k, v, *args, out_shape=None, **kwargs: sdpa_flop_count(q, k, v)}}
    sigmas = comfy.samplers.calculate_sigmas(bare.get_model_object("model_sampling"), "normal", arguments.steps)

    def run(way: str, steps: int, flops: bool = False) -> list[dict]:
        """{seconds, cpu, added, flops, output} of each of the first steps of a sampling."""
        model, (positive, negative) = all_ways[way]
        if way == "ControlNeXt, first run":
            features.clear()
        results = []

        def sampler(apply, x, sigmas, extra_args=None, **_):
            for sigma in sigmas[:-1]:
                watch.added = 0.0
                with FlopCounterMode(**counter_options) if flops else contextlib.nullcontext() as counter:
                    watch.synchronize()
                    start, cpu = time.perf_counter(), time.process_time()
                    output = apply(x, sigma.expand(len(x)), **extra_args)
                    watch.synchronize()
                    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
                results.append({"seconds": seconds, "cpu": cpu, "added": watch.added, "output": output,
                                "flops": counter.get_total_flops() if flops else None})
            return x
        with torch.inference_mode():
            comfy.sample.sample_custom(model, noise, 7.0, comfy.samplers.KSAMPLER(sampler), sigmas[:steps + 1],
                                       positive, negative, latent, disable_pbar=True, seed=1)
        return results

    def per_step(results: list[dict], what: str) -> float:
        """A step of a whole sampling: what its first step does more is spread over all."""
        first, *later = [result[what] for result in results]
        return (first + (arguments.steps - 1) * statistics.median(later)) / arguments.steps

    # One untimed call of each way warms up and counts.
    table, outputs = {}, {}
    for way in all_ways:
        results = run(way, count, flops=not arguments.compile)
        outputs[way] = results[0]["output"]
        table[way] = {"flops": None if arguments.compile else per_step(results, "flops"),
                      "seconds": [], "cpu": [], "added": [], "peak_memory": []}
    deviation = float((outputs["ControlNeXt, first run"] - outputs["reference's way"]).abs().max()
                      / outputs["reference's way"].std())
    load_before = os.getloadavg() if hasattr(os, "getloadavg") else None
    for round_number in range(arguments.rounds):
        order = list(all_ways) if round_number % 2 == 0 else list(reversed(all_ways))
        if order.index("ControlNeXt, second run") < order.index("ControlNeXt, first run"):
            order.remove("ControlNeXt, first run")  # it fills the caches for the second
            order.insert(order.index("ControlNeXt, second run"), "ControlNeXt, first run")
        for way in order:
            with harness.PeakMemory() as memory:
                results = run(way, count)
            table[way]["peak_memory"].append(memory.bytes)
            for what in ("seconds", "cpu", "added"):
                table[way][what].append(per_step(results, what))
        print(f"Round {round_number + 1} of {arguments.rounds}: "
              f"{table['UNet alone']['seconds'][-1]:.3f} s a step of the UNet alone", flush=True)

    plain = table["UNet alone"]
    reference_added = statistics.median(table["reference's way"]["added"])
    rows = []
    for way, row in table.items():
        pairs, cpu_pairs = ([one / alone - 1 for one, alone in zip(row[what], plain[what], strict=True)]
                            for what in ("seconds", "cpu"))
        row["overhead"], row["cpu_overhead"] = statistics.median(pairs), statistics.median(cpu_pairs)
        row["added_median"] = statistics.median(row["added"])
        row["added_of_reference"] = row["added_median"] / reference_added
        control = way != "UNet alone"
        rows.append([
            way,
            f"{row['flops'] / 1e12:.3f} T" if row["flops"] else "-",
            f"{row['flops'] / plain['flops'] - 1:+.2%}" if row["flops"] and control else "",
            f"{statistics.median(row['seconds']) * 1000:.1f} ms",
            f"{row['overhead']:+.1%} ({min(pairs):+.1%} to {max(pairs):+.1%})" if control else "",
            f"{row['cpu_overhead']:+.1%}" if control else "",
            f"{row['added_median'] * 1000:.1f} ms" if control else "",
            f"{row['added_of_reference']:.3f}" if control else "",
            f"{statistics.median(row['peak_memory']) / 2 ** 20:.0f} MB",
        ])
    picture = f"{width}x{height}" + (f", {frames} frames" if base == "svd" else "")
    title = (f"{base}, {picture}, {str(dtype).removeprefix('torch.')}{', cut depth' if cut else ''}"
             f"{', torch.compile' if arguments.compile else ''}, both guidance halves, {arguments.rounds} rounds, "
             f"first run of {arguments.steps} steps")
    name = f"steps_{base}_{width}x{height}{f'x{frames}' if base == 'svd' else ''}_{'cuda' if cuda else 'cpu'}"
    name += "_compile" if arguments.compile else ""
    header = ["way", "FLOPs/step", "over UNet", "median step", "over UNet, by pairs", "in CPU time",
              "control's own time", "of the reference's", "peak memory"]
    harness.report(name, title, header, rows, {"arguments": vars(arguments), "deviation_from_reference": deviation,
                                               "load": [load_before, os.getloadavg()], "ways": table})
    print(f"Largest difference of our result from the reference's way: {deviation:.1e} of its deviation. "
          f"The UNet alone took {min(plain['seconds']):.3f} to {max(plain['seconds']):.3f} s.")


if __name__ == "__main__":
    main()
