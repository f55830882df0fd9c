"""Uploads while an ``OfflineEngine`` runs: what reaches the engine of ``POST /v1/adapters``.

A thread packs adapters at an even rate and puts them into the host tier, as the library does for
the HTTP side; the engine's thread takes them from there to free slots of the bank, with its next
step. Nothing is read from a file, nothing is stored, and no request uses them.
"""

import threading
import time
from collections import deque
from types import TracebackType

import torch

from shoal.adapters.packing import pack_adapter
from shoal.adapters.spec import AdapterSpec, RowAdapter, Target
from shoal.adapters.weights import AdapterWeights
from shoal.server.engine.plan import AdapterLoad
from shoal.server.offline import BASIS_ID, OfflineEngine


class Uploads:
    """A context in which adapters come.

    Args:
        engine: with room for ``config.spare`` adapters beside the residents; what fills that room
            gives way to the newest.
        per_minute: uploads begin this often; fewer come when packing takes longer.

    Attributes:
        count: how many were put into the bank.
    """

    def __init__(self, engine: OfflineEngine, per_minute: float) -> None:
        assert engine.config.spare > 1, "an upload needs room in the bank"
        self.count = 0
        self._engine = engine
        self._every_s = 60.0 / per_minute
        self._weights = _random_weights(engine)
        self._arrived: deque[AdapterSpec] = deque()
        self._loading: list[str] = []
        self._placed: deque[str] = deque()
        self._stop = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)

    def __enter__(self) -> "Uploads":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """The bank is left as it was. Raises: what an upload raised."""
        self._stop.set()
        self._thread.join()
        self.take()
        self.take()
        for digest in self._placed:
            self._engine.slots.evict(digest)
        if problem is None and self._failed is not None:
            raise self._failed

    def take(self) -> tuple[AdapterLoad, ...]:
        """What came since the last call, each with a slot; on the engine's thread."""
        for digest in self._loading:  # the runner has them by now
            self._engine.host.unpin(digest)
        self._loading.clear()
        loads: list[AdapterLoad] = []
        while self._arrived:
            spec = self._arrived.popleft()
            if len(self._placed) == self._engine.config.spare:
                self._engine.slots.evict(self._placed.popleft())
            acquired = self._engine.slots.acquire(spec)
            assert acquired is not None, "the arena has room for it"
            self._engine.slots.release(spec.digest)
            self._placed.append(spec.digest)
            self._loading.append(spec.digest)
            loads.append(AdapterLoad(adapter=RowAdapter(spec, acquired[0])))
        self.count += len(loads)
        return tuple(loads)

    def _run(self) -> None:
        engine = self._engine
        begin, number = time.monotonic(), 0
        try:
            while not self._stop.wait(max(0.0, begin + number * self._every_s - time.monotonic())):
                number += 1
                digest = f"{'f' * 32}{number:032x}"  # beyond those of the residents
                packed = pack_adapter(self._weights, engine.shape, digest, engine.dtype)
                engine.host.put(packed, pin=True)
                self._arrived.append(packed.spec)
        except BaseException as problem:  # raised again by whoever ends the context
            self._failed = problem


def _random_weights(engine: OfflineEngine) -> AdapterWeights:
    """An adapter as a format reader returns it, for every target."""
    family, rank = engine.config.family, engine.config.rank
    tensors: dict[Target, tuple[torch.Tensor, ...]] = {}
    for target in engine.shape.targets():
        d_out, d_in = engine.shape.dims[target.module]
        if family == "core":
            tensors[target] = (torch.randn(rank, rank),)
        elif family == "fold":
            tensors[target] = (torch.randn(rank, d_out),)
        else:
            tensors[target] = (torch.randn(rank, d_in), torch.randn(d_out, rank))
    return AdapterWeights(
        format="lora",
        family=family,
        tensors=tensors,
        scales=dict.fromkeys(tensors, 0.01),
        basis_id=BASIS_ID if family == "core" else None,
    )
