"""The host tier: packed adapters in host memory; what is used least and longest ago leaves first.

Thread-safe and counted in bytes. Pinned entries (those of running or staged requests) are never
evicted. Which others stay is decided by ``residency.py``. It does not know where adapters come
from; the library puts them here. What is in here is served without the store.

Beside a CUDA device the data is page-locked, on the thread that puts it, never on the engine's.
The driver takes milliseconds for that, in which launches may have to wait: small entries are cut
from slabs (``pinned.py``). Large ones are blocks of torch's, which rounds them up to a power of two
(an 84 MB LoRA takes 128 MB) and keeps those of evicted entries for later ones of that size.
"""

import threading
from dataclasses import replace

import torch

from shoal.adapters.errors import AdapterTooLarge
from shoal.adapters.packing import PackedAdapter
from shoal.adapters.pinned import PinnedSlabs
from shoal.adapters.residency import Residency


class HostTier:
    """``PackedAdapter`` by digest, at most ``capacity_bytes`` of tensor data.

    Beside its data an entry takes about 1.2 KB of host memory, which is not counted.
    """

    def __init__(self, capacity_bytes: int) -> None:
        if capacity_bytes <= 0:
            raise ValueError(f"capacity_bytes is {capacity_bytes}, must be positive")
        self.capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._entries: dict[str, PackedAdapter] = {}
        self._residency = Residency(capacity_bytes)
        self._slabs = PinnedSlabs() if torch.cuda.is_available() else None

    @property
    def used_bytes(self) -> int:
        """Of tensor data."""
        return self._residency.used

    @property
    def pinned_bytes(self) -> int:
        """Of those, what is in use."""
        return self._residency.pinned

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, packed: PackedAdapter, *, pin: bool = False) -> None:
        """Keep ``packed``, evicting unpinned entries as needed.

        Of a digest that is already here this only counts as a use. With ``pin`` the entry is
        pinned in the same step, so that nothing can evict it in between.

        Raises:
            AdapterTooLarge: it does not fit beside what is pinned. Nothing was evicted.
        """
        digest = packed.spec.digest
        with self._lock:
            known = digest in self._entries
        if not known and self._slabs is not None:
            # Page-locked, so that the copy to the device runs beside the step. Outside the lock:
            # locking pages takes milliseconds.
            packed = replace(packed, data=self._slabs.copied(packed.data))
        with self._lock:
            if digest not in self._entries:
                self._add(packed, pin)
            elif pin:
                self._residency.pin(digest)
            else:
                self._residency.use(digest)

    def pin(self, digest: str) -> bool:
        """Keep the entry until as many ``unpin`` calls; False when it is absent."""
        with self._lock:
            if digest not in self._entries:
                return False
            self._residency.pin(digest)
            return True

    def unpin(self, digest: str) -> None:
        """Undo one ``pin``; the entry stays until room is needed."""
        with self._lock:
            self._residency.unpin(digest)

    def get(self, digest: str) -> PackedAdapter:
        """The entry. Not counted as a use, which ``pin`` is: one request does both.

        Raises:
            KeyError: it is absent.
        """
        with self._lock:
            return self._entries[digest]

    def check(self) -> None:
        """Assert the invariants: bytes add up, capacity holds, what is pinned is here."""
        with self._lock:
            self._residency.check()
            assert len(self._residency) == len(self._entries)
            assert all(digest in self._residency for digest in self._entries)
            used = sum(entry.num_bytes for entry in self._entries.values())
            assert self._residency.used == used

    def _add(self, packed: PackedAdapter, pin: bool) -> None:
        if not self._residency.room(packed.num_bytes):
            free = self.capacity_bytes - self._residency.pinned
            raise AdapterTooLarge(
                f"adapter of {packed.num_bytes} bytes does not fit in the host tier: "
                f"{free} of {self.capacity_bytes} bytes are free or not in use"
            )
        digest = packed.spec.digest
        for victim in self._residency.add(digest, packed.num_bytes, pin=pin):
            del self._entries[victim]
        self._entries[digest] = packed
