"""Page-locked memory in small pieces, asked of the driver in large ones.

Locking pages takes the driver up to milliseconds a call, in which launches may have to wait. So
what is small is cut from slabs, 64 adapters of 100 KB from one. Pieces are powers of two, and one
is used again when the tensor over it has died; slabs are never given back.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

SLAB_BYTES = 8 << 20
# Larger ones have a call of their own.
PIECE_BYTES_MAX = 1 << 20
PIECE_BYTES_MIN = 4 << 10


def page_locked(num_bytes: int) -> Tensor:
    """Uninitialised bytes that a device can copy from by itself."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


class PinnedSlabs:
    """Copies of small tensors in page-locked memory; thread-safe.

    Args:
        allocate: makes a slab.
    """

    def __init__(self, allocate: Callable[[int], Tensor] = page_locked) -> None:
        self._allocate = allocate
        self._lock = threading.Lock()
        # By size: free pieces. What a piece's death calls may come at any time, also while the
        # lock is held, so it must do without.
        self._free: dict[int, deque[Tensor]] = {}

    def copied(self, data: Tensor) -> Tensor:
        """``data`` in page-locked memory: a flat CPU tensor with the same bits.

        The memory is in use for as long as the returned tensor, and not that of views of it, is
        referred to.
        """
        size = max(PIECE_BYTES_MIN, 1 << (data.nbytes - 1).bit_length())
        if size > PIECE_BYTES_MAX:
            piece = self._allocate(data.nbytes)
            return _filled(piece, data)
        free = self._free.setdefault(size, deque())
        piece = self._piece(free, size)
        copy = _filled(piece, data)
        weakref.finalize(copy, free.append, piece).atexit = False
        return copy

    def _piece(self, free: deque[Tensor], size: int) -> Tensor:
        while True:
            try:
                return free.popleft()
            except IndexError:
                pass
            with self._lock:
                if not free:
                    free.extend(torch.split(self._allocate(SLAB_BYTES), size))


def _filled(piece: Tensor, data: Tensor) -> Tensor:
    copy = piece[: data.nbytes].view(data.dtype)
    copy.copy_(data)
    return copy
