"""Several processes that train one module together, by torch.distributed: each takes its part of the batches."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as distributed


class Ranks:
    """The processes of a training, one where torch.distributed was not started.

    Attributes:
        count: how many there are.
        own: the number of this one, from 0 on.
    """

    def __init__(self):
        joined = distributed.is_available() and distributed.is_initialized()
        self.count = distributed.get_world_size() if joined else 1
        self.own = distributed.get_rank() if joined else 0

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes, shows and prints."""
        return self.own == 0

    def share(self, items: Sequence) -> Iterable:
        """This process's part of what all are to do."""
        return items[self.own::self.count]

    def average(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors of one dtype and device, in place, by their means over all processes, in one exchange.

        Raises:
            RuntimeError: a process is gone.
        """
        if self.count == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        distributed.all_reduce(flat)
        flat /= self.count
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def wait_for_all(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            distributed.barrier()
