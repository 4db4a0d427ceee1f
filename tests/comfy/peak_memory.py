"""How much memory something takes, of the device or of this process."""

import ctypes
import gc
import sys
from pathlib import Path


def give_back_memory() -> None:
    """Free what is unused, so that it is not used again unseen when memory is measured next."""
    gc.collect()
    if sys.platform.startswith("linux"):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class PeakMemory:
    """The most memory in use above what was in use before, in bytes; of the device, or of the process (Linux alone)."""

    def __enter__(self):
        import torch
        self.cuda = torch.cuda if torch.cuda.is_available() else None
        if self.cuda:
            self.cuda.reset_peak_memory_stats()
            self.before = self.cuda.memory_allocated()
        else:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the peak starts again
            self.before = memory_status("VmRSS")
        return self

    def __exit__(self, *_):
        self.bytes = (self.cuda.max_memory_allocated() if self.cuda else memory_status("VmHWM")) - self.before


def memory_status(name: str) -> int:
    """Bytes of one entry of /proc/self/status, such as VmRSS."""
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith(name + ":"))
