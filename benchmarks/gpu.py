"""Everything that only a GPU can show, in one command: is control right there, what does it cost, what takes training.

    python benchmarks/gpu.py --minutes 10                  all parts, as many as there is time for
    python benchmarks/gpu.py right fast_flux --minutes 4   those whose names begin so
    python benchmarks/gpu.py --small                       all of them with small models, on a CPU too
    python benchmarks/gpu.py --pack FOLDER                 puts what a machine without a network needs into a folder
    python benchmarks/gpu.py --packed FOLDER --minutes 10  there, with what that folder holds

Each part runs in a process of its own, for no longer than its limit, and writes what it finds to OUT/gpu.jsonl at once.
Called again, the command goes on with the parts that are not done. It ends with a short table; OUT/gpu.md has all
figures.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import harness
from on_gpu import dynamic, pack
from on_gpu.figures import (
    DONE,
    FAILED,
    HEADER,
    TABLE,
    Work,
    read_lines,
    rows_of,
    short_table,
    write_line,
)

environment = harness.environment
EXACT, ROUNDED = 1e-3, 0.05  # how far pictures of two ways to place and compute may be apart, relative L2
CORES_EACH = 4  # of processes that run side by side
LEAST = 15.0  # seconds, for less no part is started
CUT = 2000  # characters of an error
NO_DYNAMIC = "--disable-dynamic-vram"
OFFLOADED = ("--reserve-vram", "1000", NO_DYNAMIC)  # no weight stays on the device
EXITS = {0: DONE, 3: FAILED}  # of a part's process; an error before it begins has another code
_running: set[subprocess.Popen] = set()


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        function: its module below on_gpu and its name there; takes a Work and ``arguments``.
        limit: seconds, after which its process is ended.
        options: of ComfyUI's command line.
        dynamic: with ComfyUI's dynamic VRAM.
        environment: more variables of its process.
        alone: nothing else runs at the same time, for it measures time or needs the whole device.
    """

    name: str
    function: str
    limit: float
    arguments: tuple = ()
    options: tuple[str, ...] = ()
    dynamic: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    alone: bool = False


def _placed(way: str, *options: str, most: float = EXACT, group: str = "all", **settings) -> Part:
    return Part(f"right_{way}", "placement.draw", 120, (way, group, most), options, **settings)


def _streamed(way: str, *options: str, **settings) -> Part:
    return _placed(way, *options, *OFFLOADED, most=0.0, group="streams", **settings)


def _timed(name: str, function: str, limit: float, *arguments, **settings) -> Part:
    return Part(name, function, limit, arguments, alone=True, **settings)


PARTS = (
    _placed("normal", NO_DYNAMIC, alone=True),  # what the ways after it are compared with
    Part("right_compiled", "right.compiled", 300),  # the longest first, since others run beside them
    Part("right_goldens", "right.goldens", 240),
    _placed("lowvram", "--lowvram", NO_DYNAMIC),
    _placed("novram", "--novram"),
    _placed("highvram", "--highvram"),
    _placed("offloaded", *OFFLOADED),
    _placed("dynamic", dynamic=True),
    _streamed("one_stream", "--disable-async-offload"),
    _streamed("two_streams", "--async-offload", "2", environment={"CUDA_LAUNCH_BLOCKING": "0"}),
    _streamed("two_streams_blocking", "--async-offload", "2", environment={"CUDA_LAUNCH_BLOCKING": "1"}),
    _placed("channels_last", "--force-channels-last", NO_DYNAMIC, most=ROUNDED),
    _placed("fast", NO_DYNAMIC, "--fast", most=ROUNDED),
    Part("right_precision", "right.precision", 150),
    Part("right_memory", "memory.twenty_runs", 120),
    Part("right_resumed", "training.resumed", 120),
    _timed("right_out_of_memory", "memory.brim", 90, environment={"CONTROLNEXT_CACHE_MB": "2048"}),
    _timed("fast_sd15", "fast.steps", 120, "sd15"),
    _timed("fast_sdxl", "fast.steps", 120, "sdxl"),
    _timed("fast_flux", "fast.steps", 150, "flux"),
    _timed("fast_sd35", "fast.steps", 120, "sd35"),
    _timed("fast_svd", "fast.steps", 150, "svd"),
    _timed("fast_wan", "fast.steps", 180, "wan"),
    _timed("kept_sdxl", "kept.ways", 150, "sdxl"),
    _timed("kept_sd15", "kept.ways", 120, "sd15"),
    _timed("training_sd15", "training.measured", 120, "sd15"),
    _timed("training_sdxl", "training.measured", 150, "sdxl"),
    _timed("training_sd35", "training.measured", 150, "sd35"),
    _timed("training_flux", "training.measured", 180, "flux"),
    _timed("training_flux_fp8", "training.measured", 180, "flux", "float8_e4m3fn"),
    _timed("training_wan", "training.measured", 180, "wan"),
    _timed("fast_sd15_compiled", "fast.steps", 180, "sd15", True),
    _timed("fast_sdxl_compiled", "fast.steps", 240, "sdxl", True),
    _timed("fast_flux_compiled", "fast.steps", 240, "flux", True),
    _timed("fast_sd35_compiled", "fast.steps", 180, "sd35", True),
    _timed("fast_wan_compiled", "fast.steps", 240, "wan", True),
    _timed("fast_svd_compiled", "fast.steps", 240, "svd", True),
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART",
                        help=f"how names of parts begin (default: those that are not done): "
                             f"{', '.join(part.name for part in PARTS)}")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all of it (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=harness.FOLDER / "results" / "gpu",
                        help="folder of the figures (default: benchmarks/results/gpu)")
    parser.add_argument("--small", action="store_true", help="small models, all in one process; so without a GPU")
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="make such a folder, and try it")
    parser.add_argument("--packed", type=Path, metavar="FOLDER", help="take ComfyUI and packages from it")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # a process of some parts
    return parser.parse_args()


def chosen(names: list[str], lines: list[dict], small: bool) -> list[Part]:
    """The parts of these names, or whose names begin so; without names, those that are not done at this size."""
    done = {line["part"] for line in lines if line.get("state") == DONE and line["small"] == small}
    if not names:
        return [part for part in PARTS if part.name not in done]

    own = {part.name for part in PARTS}
    found = [part for part in PARTS if any(part.name == name if name in own else part.name.startswith(name)
                                           for name in names)]
    if not found:
        sys.exit(f"Error: PART: none is or begins with {' or '.join(names)}; there are {', '.join(sorted(own))}.")
    return found


def together(parts: list[Part]) -> Iterator[list[Part]]:
    """The parts in their order, in groups that run at the same time."""
    group = []
    for part in parts:
        if part.alone:
            yield from filter(None, (group, [part]))
            group = []
        else:
            group.append(part)
    yield from filter(None, (group,))


def run_all(parts: list[Part], python: Path, out: Path, until: float) -> None:
    """Each part in a process of its own, until the time is up."""
    with ThreadPoolExecutor(max(1, min(4, (os.cpu_count() or 1) // CORES_EACH))) as pool:
        try:
            for group in together(parts):
                states = pool.map(lambda part: run_part(part, python, out, until), group)
                for part, state in zip(group, states, strict=True):
                    print(f"{part.name}: {state}", flush=True)
        except BaseException:  # whoever ends this one ends those of the parts
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(_running):
                end(process)
            raise


def run_part(part: Part, python: Path, out: Path, until: float) -> str:
    """Run one part; how it ended. One that could not say so itself is written down."""
    limit = min(part.limit, until - time.monotonic())
    if limit < LEAST:
        return "no time left"
    started = time.monotonic()
    command = [python, __file__, part.name, "--inside", "--out", out]
    state, *said = ended_in(command, limit, part.environment)
    if state not in (DONE, FAILED):
        write_line(out, {"part": part.name, "state": state, "error": said})
    return f"{state}, {time.monotonic() - started:.0f} s"


def run_small(parts: list[Part], python: Path, out: Path, until: float) -> None:
    """All parts with small models, in one process."""
    command = [python, __file__, *(part.name for part in parts), "--inside", "--small", "--out", out]
    state, *said = ended_in(command, until - time.monotonic(), {})
    print("\n".join([f"{len(parts)} parts: {state}", *said]))


def ended_in(command: list, limit: float, variables: dict[str, str]) -> list[str]:
    """Run a command for so many seconds at most: [DONE or FAILED], or [how it was ended or died, its last words]."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(list(map(str, command)), stdout=said, stderr=subprocess.STDOUT,
                                   stdin=subprocess.DEVNULL, env={**os.environ, **variables}, start_new_session=True)
        _running.add(process)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            end(process)
            state = f"ended after {limit:.0f} s"
        else:
            if process.returncode in EXITS:
                return [EXITS[process.returncode]]
            state = f"died with {process.returncode}"
        finally:
            _running.discard(process)
        said.seek(0)
        return [state, said.read()[-CUT:]]


def end(process: subprocess.Popen) -> None:
    """End a part's process and all that it has started, such as compilers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def inside(parts: list[Part], out: Path, small: bool) -> str:
    """Run parts in this process, where none takes another down; DONE if all were."""
    try:
        loaded = start_comfyui(Part("", "", 0) if small else parts[0])
    except Exception:
        for part in parts:
            write_line(out, {"part": part.name, "state": FAILED, "error": traceback.format_exc()[-CUT:]})
        return FAILED

    state = DONE
    for part in parts:
        started, how = time.perf_counter(), {"state": DONE}
        try:
            module, _, function = part.function.partition(".")
            run = getattr(importlib.import_module(f"on_gpu.{module}"), function)
            run(Work(part.name, small, loaded, out), *part.arguments)
        except Exception:
            state, how = FAILED, {"state": FAILED, "error": traceback.format_exc()[-CUT:]}
        write_line(out, {"part": part.name, **how, "seconds": time.perf_counter() - started, "small": small,
                         "machine": harness.machine()})
    return state


def start_comfyui(part: Part) -> harness.Pack:
    """Start ComfyUI in this process as a part wants it."""
    if part.dynamic:
        dynamic.before_torch()
    harness.enter(*part.options)
    if part.dynamic:
        dynamic.start()
    return harness.Pack()


def main() -> None:
    arguments = parse_arguments()
    until, out = time.monotonic() + 60 * arguments.minutes, arguments.out.absolute()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if arguments.pack:
        return pack.pack(arguments.pack.absolute())

    out.mkdir(parents=True, exist_ok=True)
    small = arguments.small or not environment.has_nvidia_gpu()
    parts = chosen(arguments.parts, read_lines(out), small)
    if arguments.inside:
        state = inside(parts, out, arguments.small)
        sys.exit(next(code for code, name in EXITS.items() if name == state))

    try:
        os.environ.update(pack.unpacked(arguments.packed.absolute()) if arguments.packed else {})
        python, comfyui = environment.set_up()
    except environment.SetupError as error:
        sys.exit(f"Error: {error}")
    os.environ.update({environment.INSIDE: "1", "COMFYUI_PATH": str(comfyui)})
    (run_small if small else run_all)(parts, python, out, until)
    lines = read_lines(out)
    (out / TABLE).write_text(harness.table(HEADER, rows_of(lines)) + "\n", encoding="utf-8")
    print(f"\n{short_table(lines)}\n\nAll figures: {out / TABLE}")


if __name__ == "__main__":
    main()
