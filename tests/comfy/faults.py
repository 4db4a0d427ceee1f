"""Real faults: a process that ends by SIGKILL while it writes, and a disk that takes no more."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch


def bytes_below(folder: Path) -> int:
    """Bytes of all files in a folder and its folders, while others write, move and remove them."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                pass
    return total


def kill_while_writing(write: Callable[[], None], folder: Path, size: int) -> bool:
    """Run ``write`` in a copy of this process, and kill that one once it has written ``size`` bytes below ``folder``.

    False: it was so quick that it had ended before.
    """
    if not hasattr(os, "fork"):
        pytest.skip("this system copies no processes")
    before = bytes_below(folder)
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)  # the threads of the computations are not in the copy
            write()
        finally:
            os._exit(0)
    while bytes_below(folder) - before < size:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file takes more than ``size`` bytes: the system refuses to write them, as on a full disk."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
