"""A bounded store of computed features, owned by the loaded model and freed with it."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch


class FeatureCache:
    """Least recently used tensors, at most ``limit`` bytes; what is larger is computed anew each time.

    Safe to use from the threads of ComfyUI's multi-GPU sampling; keys hold the device.
    """

    def __init__(self, limit: int = 512 * 1024 * 1024):
        self.limit = limit
        self.size = 0
        self._entries: OrderedDict[Hashable, tuple[torch.Tensor, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, compute: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        """The tensors kept under ``key``, or those that ``compute`` returns, kept when they fit."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        tensors = compute()
        size = _bytes(tensors)
        if size <= self.limit:
            with self._lock:
                self._drop(key)
                self._entries[key] = tensors
                self.size += size
                while self.size > self.limit:
                    self._drop(next(iter(self._entries)))
        return tensors

    def clear(self, unwanted: Callable[[Hashable], bool] = lambda key: True) -> None:
        """Forget every entry whose key is ``unwanted``."""
        with self._lock:
            for key in [key for key in self._entries if unwanted(key)]:
                self._drop(key)

    def _drop(self, key: Hashable) -> None:
        self.size -= _bytes(self._entries.pop(key, ()))


def _bytes(tensors: tuple[torch.Tensor, ...]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
