"""Adapters of requests that still wait: copied into the device bank before their turn comes.

Pure. What the next requests in the queue need is *held*: pinned in the bank, and copied there if it
is not resident, a bounded part of it with each step, while that step runs. Holding is not using: it
counts for nothing when the bank decides who leaves, and whoever starts now takes the room of what
is only held, from the end of the queue. So running requests and earlier ones always come first.
"""

from shoal.adapters.slots import SlotTable
from shoal.adapters.spec import AdapterSpec, RowAdapter
from shoal.server.engine.fairness import FairQueue
from shoal.server.engine.plan import AdapterLoad
from shoal.server.engine.sequence import Sequence

# How far down the queue to look, and how many of one tenant.
LOOK_MAX = 16
LOOK_OF_ONE = 4
# Copied with one step: so many elements (16 MB of float32), or a single larger adapter.
ELEMENTS_A_STEP = 4 << 20
# Of the bank, at most, held for those that wait.
HELD_SHARE = 0.5


class LookAhead:
    """What is held in ``slots`` for requests that wait."""

    def __init__(self, slots: SlotTable) -> None:
        self._slots = slots
        self._held: dict[str, int] = {}  # digest -> units, the next in turn first
        self._units_max = int(slots.num_units * HELD_SHARE)

    @property
    def held(self) -> frozenset[str]:
        """Digests with a pin of ours."""
        return frozenset(self._held)

    def look(self, waiting: FairQueue[Sequence], avoid: set[str]) -> list[AdapterLoad]:
        """Hold what the next requests need, and nothing else; what to copy with this step.

        Args:
            avoid: digests that are not to be held.
        """
        wanted = self._wanted(waiting, avoid)
        held: dict[str, int] = {}
        for digest in [digest for digest in self._held if digest not in wanted]:
            self.let_go(digest)
        loads: list[AdapterLoad] = []
        budget, units = ELEMENTS_A_STEP, 0
        for digest, spec in wanted.items():
            taken = self._held.get(digest)
            if taken is None:
                resident = self._slots.resident(digest)
                if not resident and loads and spec.packed_elements > budget:
                    break
                if units + self._slots.units(spec) > self._units_max:
                    break
                acquired = self._slots.hold(spec)
                if acquired is None:
                    break
                slot, needs_load = acquired
                taken = slot.num_units
                if needs_load:
                    loads.append(AdapterLoad(adapter=RowAdapter(spec, slot)))
                    budget -= spec.packed_elements
            held[digest] = taken
            units += taken
        for digest in [digest for digest in self._held if digest not in held]:
            self.let_go(digest)
        self._held = held
        return loads

    def make_room(self) -> bool:
        """Let go of what is needed last; False when nothing is held."""
        if not self._held:
            return False
        self.let_go(next(reversed(self._held)))
        return True

    def let_go(self, digest: str) -> None:
        """No longer hold it; it stays resident until its place is needed."""
        if self._held.pop(digest, None) is not None:
            self._slots.release(digest)

    def let_go_all(self) -> None:
        """Hold nothing."""
        for digest in list(self._held):
            self.let_go(digest)

    def _wanted(self, waiting: FairQueue[Sequence], avoid: set[str]) -> dict[str, AdapterSpec]:
        wanted: dict[str, AdapterSpec] = {}
        for _ in range(LOOK_MAX):
            seq = waiting.peek()
            if seq is None:
                break
            adapter = seq.request.adapter
            if adapter is not None and adapter.digest not in avoid:
                wanted.setdefault(adapter.digest, adapter)
            waiting.skip(LOOK_OF_ONE)
        waiting.rewind()
        return wanted
