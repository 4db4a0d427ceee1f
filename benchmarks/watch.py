"""A watch for what control adds to a sampling's steps, whatever it tells the time by."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager


class ControlWatch:
    """Its derived classes say how the time of a block is taken."""

    def adding(self, sign: int = 1) -> AbstractContextManager:
        """Add the block's time to control's, or take it off with a ``sign`` of -1."""
        raise NotImplementedError

    def watched(self, function: Callable) -> Callable:
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
