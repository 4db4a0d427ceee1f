"""A bounded store of computed tensors, owned by the loaded model and freed with it."""

import itertools
import logging
import os
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator

import comfy.model_management
import torch

VARIABLE = "CONTROLNEXT_CACHE_MB"
DEFAULT_MB = 512


def limit_from_environment() -> int:
    """Bytes that each loaded model may keep: CONTROLNEXT_CACHE_MB (megabytes; 0 is off), or 512 MB.

    Raises:
        ValueError: the variable is not a whole number of megabytes.
    """
    text = os.environ.get(VARIABLE) or str(DEFAULT_MB)
    if not text.isdecimal():
        raise ValueError(f"{VARIABLE}: {text!r} is not a whole number of megabytes; set it to 0 (off) or more.")
    return int(text) * 1024 ** 2


class Kept:
    """Tensors that stay ``on_host``, and while they are needed lie ``on_device`` too, the one that computed them.

    The way to the host and back goes beside the computation where ComfyUI has pinned memory and a stream for that.

    Args:
        host: the device that ComfyUI offloads to; None to stay on the one that computed them.
        step: as in ``FeatureCache.get``.
    """

    def __init__(self, tensors: tuple[torch.Tensor, ...], host: torch.device | None, step: Hashable):
        self.device = tensors[0].device
        self.moves = host is not None and host != self.device
        self.size = _bytes(tensors)
        self.step = step
        self.on_device = self.on_host = tensors
        self._stream = None
        if self.moves:
            self.on_host = tuple(torch.empty_like(tensor, device=host) for tensor in tensors)
            pinned = [tensor for tensor in self.on_host if comfy.model_management.pin_memory(tensor)]
            weakref.finalize(self, _unpin, pinned).atexit = False
            for there, tensor in zip(self.on_host, tensors, strict=True):
                there.copy_(tensor, non_blocking=comfy.model_management.device_supports_non_blocking(self.device))

    def fetch(self) -> None:
        """Begin to copy to the device what is not there."""
        if self.on_device is None:
            self._stream = comfy.model_management.get_offload_stream(self.device)
            if self._stream is not None:  # they may still be on their way to the host
                self._stream.wait_stream(comfy.model_management.current_stream(self.device))
            non_blocking = comfy.model_management.device_supports_non_blocking(self.device)
            self.on_device = tuple(comfy.model_management.cast_to(tensor, device=self.device, non_blocking=non_blocking,
                                                             stream=self._stream) for tensor in self.on_host)

    def get(self) -> tuple[torch.Tensor, ...]:
        """The tensors on the device, once fetched, for the computation that runs there now."""
        if self._stream is not None:
            comfy.model_management.sync_stream(self.device, self._stream)
            for tensor in self.on_device:  # their memory is the stream's, which must not give it away too early
                tensor.record_stream(comfy.model_management.current_stream(self.device))
            self._stream = None
        return self.on_device

    def leave(self) -> None:
        """Give up those on the device."""
        self.on_device = self._stream = None


def _unpin(tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        comfy.model_management.unpin_memory(tensor)


def _bytes(tensors: tuple[torch.Tensor, ...]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


class FeatureCache:
    """Tensors of at most ``limit`` bytes, kept from run to run; 0 keeps nothing.

    What the current run has used stays until it ends. Room is made from the oldest run, its last entries first: a run
    asks for the same entries in the same order again, so when not all fit, the first ones are there the next time
    (plain least-recently-used order would drop each one just before its use).

    With a ``host``, the device has only those that the current step needs and, once an earlier run is seen to be
    repeated, those of its next step.

    Safe to use from the threads of ComfyUI's multi-GPU sampling; keys hold the device.
    """

    def __init__(self, limit: int, host: torch.device | None = None):
        self.limit, self.host = limit, host
        self.size = 0
        self._runs: list[dict[Hashable, Kept]] = [{}]  # by last use, the current run's at the end
        self._on_device: list[Kept] = []
        self._step: Hashable = None
        self._lock = threading.Lock()

    def holds(self, key: Hashable) -> bool:
        """Whether ``get`` would compute nothing."""
        with self._lock:
            return self._holds(key)

    def get(self, key: Hashable, compute: Callable[[], tuple[torch.Tensor, ...]],
            step: Hashable = None) -> tuple[torch.Tensor, ...]:
        """The tensors kept under ``key``, or those that ``compute`` returns, kept when there is room for them.

        Args:
            step: the same for all that is needed at the same time, None for what every step needs.
        """
        with self._lock:
            arrived, self._step = step != self._step, step
            if arrived:
                self._leave([kept for kept in self._on_device if kept.step != step])
            for run in self._runs:
                if key in run:
                    self._fetch([run[key]])
                    if arrived:
                        self._prefetch(_from_here_to_the_next_step(run, key))
                    kept = self._runs[-1][key] = run.pop(key)
                    return kept.get()
        with torch.no_grad():  # kept tensors hold no graph of a training
            tensors = compute()
        size = _bytes(tensors)
        with self._lock:
            if size <= self.limit and not self._holds(key):  # another thread may have kept it by now
                self._make_room(size)
                if self.size + size <= self.limit:
                    self._keep(key, tensors, step)
        return tensors

    def end_run(self) -> None:
        """From now on, what was used so far may make room for what is used next."""
        with self._lock:
            self._runs = [run for run in self._runs if run] + [{}]
            self._leave(self._on_device)
            self._step = None

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._runs, self._on_device, self._step = [{}], [], None
            self.size = 0

    def kept(self) -> list[Kept]:
        """All that is kept, by last use."""
        return [kept for run in self._runs for kept in run.values()]

    def free_device(self) -> None:
        """Forget those that are nowhere but on the device."""
        with self._lock:
            self._leave(self._on_device)
            self._runs = [{key: kept for key, kept in run.items() if kept.moves} for run in self._runs]
            self.size = sum(kept.size for kept in self.kept())

    def _holds(self, key: Hashable) -> bool:
        return any(key in run for run in self._runs)

    def _keep(self, key: Hashable, tensors: tuple[torch.Tensor, ...], step: Hashable) -> None:
        try:
            kept = Kept(tensors, self.host, step)
        except (RuntimeError, MemoryError) as error:  # no room on the host: nothing but this is lost
            logging.warning("ControlNeXt: features are not kept for the next run (%s).", type(error).__name__)
            return
        self._runs[-1][key] = kept
        self.size += kept.size
        self._fetch([kept])

    def _fetch(self, entries: Iterable[Kept]) -> None:
        for kept in entries:
            kept.fetch()
            if kept.moves and kept not in self._on_device:
                self._on_device.append(kept)

    def _prefetch(self, entries: Iterable[Kept]) -> None:
        try:
            self._fetch(entries)
        except RuntimeError:  # no room on the device yet: each is fetched when it is needed
            pass

    def _leave(self, entries: list[Kept]) -> None:
        for kept in entries:
            kept.leave()
        self._on_device = [kept for kept in self._on_device if kept.on_device is not None]

    def _make_room(self, size: int) -> None:
        for run in self._runs[:-1]:
            while run and self.size + size > self.limit:
                self.size -= run.popitem()[1].size


def _from_here_to_the_next_step(run: dict[Hashable, Kept], key: Hashable) -> Iterator[Kept]:
    """The entry of ``key`` and those behind it, to the end of the step after its own."""
    steps = []
    for kept in itertools.islice(run.values(), list(run).index(key), None):
        if kept.step not in steps:
            steps.append(kept.step)
        if len(steps) > 2:
            return
        yield kept
