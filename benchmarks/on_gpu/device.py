"""The device's time line, clocks and memory, and what a profile says of what ran on it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from watch import ControlWatch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
CLOCKS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # kinds of events in a profile
GAP = 2.0  # microseconds that the device waits between two kernels at least, to be counted
LONGEST = 25  # names of a profile that are written down


def wait() -> None:
    """Until the device has done all that it was given."""
    if CUDA:
        torch.cuda.synchronize()


def mark() -> torch.cuda.Event | float:
    """A moment on the device's time line, behind all that it was given to do so far; nothing waits for it."""
    if not CUDA:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    """Between two moments, which the device has passed."""
    return start.elapsed_time(end) / 1000 if CUDA else end - start


class Watch(ControlWatch):
    """A watch for steps and for what control adds to them; it is read when all steps are over.

    Attributes:
        control: (sign, start, end) of the pieces of the present step that are control's.
    """

    def __init__(self):
        self.steps: list[tuple] = []
        self.control: list[tuple] = []

    def step(self, apply: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What ``apply`` gives; it is one step."""
        self.control = []
        start = mark()
        output = apply()
        self.steps.append((start, mark(), self.control))
        return output

    @contextlib.contextmanager
    def adding(self, sign: int = 1):
        start = mark()
        try:
            yield
        finally:
            self.control.append((sign, start, mark()))

    def read(self) -> list[tuple[float, float]]:
        """(seconds, those of control) of each step since the last time."""
        wait()
        steps, self.steps = self.steps, []
        return [(seconds(start, end), sum(sign * seconds(*piece) for sign, *piece in control))
                for start, end, control in steps]


def clocks() -> dict | None:
    """What nvidia-smi says of the card now."""
    if not CUDA:
        return None
    asked = subprocess.run(["nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader", "--id=0"],
                           capture_output=True, text=True)
    return dict(zip(CLOCKS, map(str.strip, asked.stdout.split(",")), strict=False))


def allocated() -> int:
    """Bytes of tensors on the device, without those that wait for a garbage collection."""
    import gc
    gc.collect()
    wait()
    return torch.cuda.memory_allocated() if CUDA else 0


def profiled(function: Callable[[], object]) -> dict:
    """``summary`` of what runs on the device during a call, which must have been warmed up."""
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * CUDA
    wait()
    with torch.profiler.profile(activities=kinds) as profile:
        function()
        wait()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        return summary(json.loads(file.read_text())["traceEvents"])


def summary(events: list[dict]) -> dict:
    """Kernels, gaps, copies and synchronisations of a trace in Chrome's form, times in microseconds.

    Returns {span, busy: on the device, kernels: {name: [number, time]}, copies: {name: [number, time, bytes]}, gaps:
    {number, time, after: {what the device did before it: time}}, waits: {call of CUDA's that waits: [number, time]}}.
    """
    ran = sorted((event for event in events if event.get("cat") in ON_DEVICE), key=lambda event: event["ts"])
    kernels, copies, waits = (defaultdict(lambda: [0, 0.0]) for _ in range(3))
    size, after, gaps = Counter(), Counter(), [0, 0.0]
    end, busy, last = None, 0.0, ""

    for event in ran:
        start, stop = event["ts"], event["ts"] + event["dur"]
        if end is not None and start - end > GAP:
            gaps[0] += 1
            gaps[1] += start - end
            after[last[:100]] += start - end
        busy += max(0.0, stop - max(start, start if end is None else end))
        if end is None or stop > end:
            end, last = stop, event["name"]
        found = kernels if event["cat"] == "kernel" else copies
        _count(found, event)
        size[event["name"][:100]] += event.get("args", {}).get("bytes", 0)

    for event in events:
        if event.get("cat") == "cuda_runtime" and "Synchronize" in event["name"]:
            _count(waits, event)
    return {"span": end - ran[0]["ts"] if ran else 0.0, "busy": busy, "kernels": _longest(kernels),
            "copies": {name: [*found, size[name]] for name, found in copies.items()},
            "gaps": {"number": gaps[0], "time": gaps[1], "after": dict(after.most_common(LONGEST))},
            "waits": dict(waits)}


def _count(found: dict[str, list], event: dict) -> None:
    entry = found[event["name"][:100]]
    entry[0] += 1
    entry[1] += event["dur"]


def _longest(found: dict[str, list]) -> dict[str, list]:
    return dict(sorted(found.items(), key=lambda item: -item[1][1])[:LONGEST])
