"""The processes that train together: data parallel, on the devices of one machine.

Each of them holds the base and all adapters, and reads an equal share of every batch's rows; the
gradients of the adapters are summed, and every process makes the same update. One process writes.
``torchrun`` starts them and says by environment variables who is who.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed

from shoal.adapters.training.errors import OptionRejected

# How long a process waits for the others: the first may have to decompose a large base meanwhile.
_PATIENCE = timedelta(hours=2)


@dataclass(frozen=True, slots=True)
class World:
    """One process among ``size``.

    Attributes:
        rank: which one this is.
        size: how many there are.
        local_rank: which device of the machine is its own.
        meeting: where the processes find each other, as torch's ``init_method``.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    meeting: str = "env://"

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> "World":
        """As ``torchrun`` set it; alone without it."""
        if "RANK" not in environment or "WORLD_SIZE" not in environment:
            return cls()
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        return cls(rank, size, int(environment.get("LOCAL_RANK", rank)))

    @property
    def writes(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def rows(self, batch_size: int) -> slice:
        """Which rows of each lane's batch are this process's.

        Raises:
            OptionRejected: the processes cannot share them equally.
        """
        if batch_size % self.size:
            rule = f"must be a multiple of the {self.size} processes that share it"
            raise OptionRejected("batch-size", batch_size, rule)
        share = batch_size // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """Meet the others; part from them at the end."""
        if self.size == 1:
            yield
            return
        cuda = device.type == "cuda"
        distributed.init_process_group(
            "nccl" if cuda else "gloo",
            init_method=self.meeting,
            rank=self.rank,
            world_size=self.size,
            device_id=device if cuda else None,
            timeout=_PATIENCE,
        )
        try:
            yield
        finally:
            distributed.destroy_process_group()

    def sum(self, tensor: Tensor) -> None:
        """Replace the tensor by its sum over all processes."""
        if self.size > 1:
            distributed.all_reduce(tensor)

    def wait(self) -> None:
        """Return when every process is here."""
        if self.size > 1:
            distributed.barrier()

    @contextmanager
    def first_writer(self) -> Iterator[None]:
        """The writing process goes through alone, then the others do."""
        if not self.writes:
            self.wait()
        yield
        if self.writes:
            self.wait()
