"""A bounded store of computed tensors, owned by the loaded model and freed with it."""

import os
import threading
from collections.abc import Callable, Hashable

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


class FeatureCache:
    """Tensors of at most ``limit`` bytes, kept from run to run; 0 keeps nothing.

    What the current run has used stays until it ends. Room is made from the oldest run, its last entries first: a run
    asks for the same entries in the same order again, so when not all fit, the first ones are there the next time
    (plain least-recently-used order would drop each one just before its use).

    Safe to use from the threads of ComfyUI's multi-GPU sampling; keys hold the device.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.size = 0
        self._runs: list[dict[Hashable, tuple[torch.Tensor, ...]]] = [{}]  # by last use, the current run's at the end
        self._lock = threading.Lock()

    def get(self, key: Hashable, compute: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        """The tensors kept under ``key``, or those that ``compute`` returns, kept when there is room for them."""
        with self._lock:
            for run in self._runs:
                if key in run:
                    tensors = self._runs[-1][key] = run.pop(key)
                    return tensors
        with torch.no_grad():  # what is kept holds no graph of a training
            tensors = compute()
        size = _bytes(tensors)
        with self._lock:
            if size <= self.limit and key not in self._runs[-1]:
                self._make_room(size)
                if self.size + size <= self.limit:
                    self._runs[-1][key] = tensors
                    self.size += size
        return tensors

    def end_run(self) -> None:
        """From now on, what was used so far may make room for what is used next."""
        with self._lock:
            self._runs = [run for run in self._runs if run] + [{}]

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._runs = [{}]
            self.size = 0

    def _make_room(self, size: int) -> None:
        for run in self._runs[:-1]:
            while run and self.size + size > self.limit:
                self.size -= _bytes(run.popitem()[1])


def _bytes(tensors: tuple[torch.Tensor, ...]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
