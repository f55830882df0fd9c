"""Whose rows are in the next step: turns in a fixed order. Integers and names; no tensors.

A fleet has a number of slots in the bank and a number of rows in a step. Tenants wait until a slot
is free, then take turns with the others that have one until they are finished.
"""

from collections import deque
from collections.abc import Iterable, Mapping


class Turns:
    """Admission and turns.

    Attributes:
        order: tenants with a slot, next first.
        slots: their slots.
        waiting: those without, first come first.
    """

    def __init__(self, capacity: int, rows: int, sizes: Mapping[str, int]) -> None:
        """Begin with everybody waiting.

        Args:
            capacity: slots.
            rows: of a step.
            sizes: rows that each tenant has in a step, 1 to ``rows``; all tenants, in their order.
        """
        if capacity < 1 or any(not 1 <= size <= rows for size in sizes.values()):
            raise ValueError("a slot is needed, and a tenant's rows must fit a step")
        self._rows = rows
        self._sizes = dict(sizes)
        self._free = list(range(capacity))
        self.order: deque[str] = deque()
        self.slots: dict[str, int] = {}
        self.waiting = deque(sizes)

    @property
    def over(self) -> bool:
        """Whether everybody is finished."""
        return not self.order and not self.waiting

    def admit(self) -> list[str]:
        """Give free slots, the lowest first, to those who wait; whose turn comes last."""
        came = []
        while self._free and self.waiting:
            name = self.waiting.popleft()
            self.slots[name] = self._free.pop(0)
            self.order.append(name)
            came.append(name)
        return came

    def wave(self) -> list[str]:
        """Who is in the next step: in turn, as many as fit."""
        wave, left = [], self._rows
        for name in self.order:
            left -= self._sizes[name]
            if left < 0:
                break
            wave.append(name)
        return wave

    def pass_on(self, wave: Iterable[str]) -> None:
        """Those of the wave have had their turn."""
        for name in wave:
            self.order.remove(name)
            self.order.append(name)

    def leave(self, name: str) -> int:
        """A tenant is finished; returns the slot that it had."""
        self.order.remove(name)
        slot = self.slots.pop(name)
        self._free.append(slot)
        self._free.sort()
        return slot

    def restore(self, order: Iterable[str], slots: Mapping[str, int], done: Iterable[str]) -> None:
        """Go on where another left off.

        Args:
            order, slots: as they were.
            done: who is finished; whoever is in neither waits.
        """
        self.order = deque(order)
        self.slots = dict(slots)
        self._free = [slot for slot in self._free if slot not in set(slots.values())]
        gone = {*self.order, *done}
        self.waiting = deque(name for name in self._sizes if name not in gone)
