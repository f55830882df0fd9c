"""``Staging``: small per-step arrays, written on the host and copied to the device in one go.

The device tensors are static: kernels of a captured graph go on reading the same addresses. The
host side is a ring of page-locked buffers, so that writing the arrays of the next step does not
wait for the copy of this one.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

RING = 3
ALIGNMENT = 16

_NUMPY: dict[torch.dtype, Any] = {
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.float32: np.float32,
    torch.float64: np.float64,
}


class Staging:
    """Named 1-D arrays in one block of memory, in the order given.

    Attributes:
        device: each array's tensor on the device, by name.
    """

    def __init__(self, fields: Mapping[str, tuple[torch.dtype, int]], device: torch.device) -> None:
        """Args:
        fields: name -> dtype and length. Put what is long and often not full last.
        """
        self._fields = dict(fields)
        self._offsets: dict[str, int] = {}
        size = 0
        for name, (dtype, length) in self._fields.items():
            self._offsets[name] = size
            size += -(-length * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self._target = torch.zeros(size, dtype=torch.uint8, device=device)
        self.device: dict[str, Tensor] = {
            name: self._target[at : at + length * dtype.itemsize].view(dtype)
            for name, at, dtype, length in self._layout()
        }
        self._on_cuda = device.type == "cuda"
        self._ring = [self._slot(size) for _ in range(RING if self._on_cuda else 1)]
        self._turn = 0

    def begin(self) -> SimpleNamespace:
        """Host arrays (numpy) of the next upload, as attributes; their content is that of an
        earlier step. Waits only if the device is ``RING`` uploads behind."""
        slot = self._ring[self._turn]
        if slot.copied is not None:
            slot.copied.synchronize()
        return slot.arrays  # type: ignore[no-any-return]

    def upload(self, last: str, count: int) -> None:
        """Copy everything up to ``count`` entries of ``last`` to the device, on the current stream.

        Arrays behind ``last`` keep what they have on the device.
        """
        slot = self._ring[self._turn]
        self._turn = (self._turn + 1) % len(self._ring)
        end = self._offsets[last] + count * self._fields[last][0].itemsize
        self._target[:end].copy_(slot.memory[:end], non_blocking=True)
        if self._on_cuda:
            slot.copied.record()

    def _layout(self) -> list[tuple[str, int, torch.dtype, int]]:
        return [
            (name, self._offsets[name], dtype, length)
            for name, (dtype, length) in self._fields.items()
        ]

    def _slot(self, size: int) -> SimpleNamespace:
        memory = torch.zeros(size, dtype=torch.uint8, pin_memory=self._on_cuda)
        raw = memory.numpy()
        arrays = {
            name: raw[at : at + length * dtype.itemsize].view(_NUMPY[dtype])
            for name, at, dtype, length in self._layout()
        }
        event = torch.cuda.Event() if self._on_cuda else None  # type: ignore[no-untyped-call]
        return SimpleNamespace(memory=memory, arrays=SimpleNamespace(**arrays), copied=event)
