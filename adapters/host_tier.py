"""The host tier: packed adapters in host memory, least recently used out first.

Thread-safe and counted in bytes. Pinned entries (those of running or staged requests) are never
evicted. It does not know where adapters come from; the library puts them here.

Beside a CUDA device the data is page-locked, on the thread that puts it, never on the engine's.
Torch rounds such blocks up to a power of two (an 84 MB LoRA takes 128 MB) and keeps those of
evicted entries for later ones of that size. So a tier that is full of one kind of adapter asks the
driver for nothing, while one that still fills does for each entry; that takes milliseconds, in
which launches may have to wait.
"""

import threading
from collections import OrderedDict
from dataclasses import replace

import torch

from shoal.adapters.errors import AdapterTooLarge
from shoal.adapters.packing import PackedAdapter


class HostTier:
    """An LRU of ``PackedAdapter`` by digest, at most ``capacity_bytes`` of tensor data."""

    def __init__(self, capacity_bytes: int) -> None:
        if capacity_bytes <= 0:
            raise ValueError(f"capacity_bytes is {capacity_bytes}, must be positive")
        self.capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, PackedAdapter] = OrderedDict()
        self._pins: dict[str, int] = {}
        self._used = 0

    @property
    def used_bytes(self) -> int:
        return self._used

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, packed: PackedAdapter, *, pin: bool = False) -> None:
        """Keep ``packed``, evicting the least recently used unpinned entries as needed.

        A digest that is already here only becomes recent. With ``pin`` the entry is pinned in
        the same step, so that nothing can evict it in between.

        Raises:
            AdapterTooLarge: it does not fit beside what is pinned. Nothing was evicted.
        """
        digest = packed.spec.digest
        with self._lock:
            known = digest in self._entries
        if not known and torch.cuda.is_available():
            # Page-locked, so that the copy to the device runs beside the step. Outside the lock:
            # locking pages takes milliseconds.
            packed = replace(packed, data=packed.data.pin_memory())
        with self._lock:
            if digest not in self._entries:
                self._make_room(packed)
                self._entries[digest] = packed
                self._used += packed.num_bytes
            self._entries.move_to_end(digest)
            if pin:
                self._pins[digest] = self._pins.get(digest, 0) + 1

    def pin(self, digest: str) -> bool:
        """Keep the entry until as many ``unpin`` calls; False when it is absent."""
        with self._lock:
            if digest not in self._entries:
                return False
            self._entries.move_to_end(digest)
            self._pins[digest] = self._pins.get(digest, 0) + 1
            return True

    def unpin(self, digest: str) -> None:
        """Undo one ``pin``; the entry stays until room is needed."""
        with self._lock:
            count = self._pins.get(digest, 0)
            assert count > 0, f"unpin of {digest}, which is not pinned"
            if count == 1:
                del self._pins[digest]
            else:
                self._pins[digest] = count - 1

    def get(self, digest: str) -> PackedAdapter:
        """The entry, which becomes the most recent.

        Raises:
            KeyError: it is absent.
        """
        with self._lock:
            packed = self._entries[digest]
            self._entries.move_to_end(digest)
            return packed

    def check(self) -> None:
        """Assert the invariants: bytes add up, capacity holds, what is pinned is here."""
        with self._lock:
            assert self._used == sum(entry.num_bytes for entry in self._entries.values())
            assert self._used <= self.capacity_bytes
            assert set(self._pins) <= set(self._entries)
            assert all(count > 0 for count in self._pins.values())

    def _make_room(self, packed: PackedAdapter) -> None:
        """Evict until ``packed`` fits; decides first, so that a refusal changes nothing."""
        free = self.capacity_bytes - self._used
        victims = []
        for digest, entry in self._entries.items():
            if free >= packed.num_bytes:
                break
            if digest not in self._pins:
                victims.append(digest)
                free += entry.num_bytes
        if free < packed.num_bytes:
            raise AdapterTooLarge(
                f"adapter of {packed.num_bytes} bytes does not fit in the host tier: "
                f"{free} of {self.capacity_bytes} bytes are free or not in use"
            )
        for digest in victims:
            self._used -= self._entries.pop(digest).num_bytes
