"""Which adapter sits where in the device bank: extents of units, pins, eviction.

Pure bookkeeping; ``bank.py`` owns the tensors. An adapter is one contiguous extent. Extents are
placed first-fit and coalesce when they leave. An adapter stays resident after its last pin is
gone, and leaves only when its place is needed: the least recently used one goes first, but who was
used again since it came is passed over once for each time, three at most, so that many adapters
that are used once do not flush those in demand. When the victim's extent is too small its
neighbours go with it. (Evicting by age alone, wherever the victims lie, would throw out most of a
bank of small adapters to make one large hole.)
"""

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from shoal.adapters.spec import AdapterSpec, Slot

# Uses after the first that are remembered.
USES_MAX = 3


class SlotTable:
    """Places adapters in ``num_units`` units of ``unit_elements`` elements each.

    Acquiring a resident adapter, releasing and evicting cost O(log n) in the resident adapters;
    placing one costs in addition the number of distinct free sizes, and, when something must
    leave, the number of pinned adapters. Passing over those in demand is amortised over their uses.
    """

    def __init__(self, num_units: int, unit_elements: int) -> None:
        if num_units < 0 or unit_elements < 1:
            raise ValueError(
                f"num_units={num_units} must be >= 0 and unit_elements={unit_elements} >= 1"
            )
        self.num_units = num_units
        self.unit_elements = unit_elements
        self._free = _FreeExtents(num_units)
        self._residents: dict[str, _Resident] = {}
        self._at_start: dict[int, _Resident] = {}
        self._at_end: dict[int, _Resident] = {}
        # Unpinned digests, least recently used or passed over first. (The front of a plain dict
        # is slow to find once many have left there.)
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._pinned: list[tuple[int, int]] = []  # (start, end) of pinned extents, sorted
        self._clock = 0

    @property
    def num_resident(self) -> int:
        """Adapters in the bank, pinned or not."""
        return len(self._residents)

    @property
    def num_pinned(self) -> int:
        """Adapters in the bank that at least one caller holds."""
        return len(self._pinned)

    def resident(self, digest: str) -> bool:
        """Whether the adapter has a place in the bank."""
        return digest in self._residents

    def fits(self, spec: AdapterSpec) -> bool:
        """Whether the adapter could ever have a place (in an otherwise empty bank)."""
        return self.units(spec) <= self.num_units

    def acquire(self, spec: AdapterSpec) -> tuple[Slot, bool] | None:
        """Pin ``spec``'s place, making one when it has none.

        Returns:
            The slot and whether the adapter must be copied into it first, or None when it cannot
            fit now because too much of the rest is pinned (nothing is changed then).
        """
        return self._pin(spec, uses=1)

    def hold(self, spec: AdapterSpec) -> tuple[Slot, bool] | None:
        """As ``acquire``, for somebody who may use it later: it does not count as a use."""
        return self._pin(spec, uses=0)

    def _pin(self, spec: AdapterSpec, uses: int) -> tuple[Slot, bool] | None:
        resident = self._residents.get(spec.digest)
        if resident is not None:
            if not resident.pins:
                del self._idle[spec.digest]
                insort(self._pinned, resident.extent)
            resident.pins += 1
            resident.uses = min(resident.uses + uses, USES_MAX)
            return Slot(resident.start, resident.end - resident.start), False
        units = self.units(spec)
        start = self._free.find(units)
        if start is None:
            start = self._make_room(units)
        if start is None:
            return None
        self._free.take(start, units)
        resident = _Resident(spec.digest, start, start + units, pins=1, uses=uses - 1)
        self._residents[spec.digest] = resident
        self._at_start[resident.start] = resident
        self._at_end[resident.end] = resident
        insort(self._pinned, resident.extent)
        return Slot(start, units), True

    def release(self, digest: str) -> None:
        """Undo one ``acquire``. The adapter stays resident until its place is needed."""
        resident = self._residents[digest]
        assert resident.pins > 0, f"{digest} released more often than acquired"
        resident.pins -= 1
        if not resident.pins:
            del self._pinned[bisect_left(self._pinned, resident.extent)]
            self._age(resident)

    def evict(self, digest: str) -> bool:
        """Drop an unpinned adapter; False (and no change) when it is pinned or not resident."""
        resident = self._residents.get(digest)
        if resident is None or resident.pins:
            return False
        del self._residents[digest]
        del self._at_start[resident.start]
        del self._at_end[resident.end]
        del self._idle[digest]
        self._free.give(resident.start, resident.end)
        return True

    def check(self) -> None:
        """Assert every invariant; O(n), for tests."""
        extents = sorted(r.extent for r in self._residents.values())
        free = sorted(self._free.extents())
        edge = 0
        for start, end in sorted(extents + free):
            assert start == edge, f"hole or overlap at unit {edge}"
            assert end > start
            edge = end
        assert edge == self.num_units
        free_starts = {start for start, _ in free}
        assert not any(end in free_starts for _, end in free), "free extents did not coalesce"
        residents = self._residents.values()
        assert self._at_start == {r.start: r for r in residents}
        assert self._at_end == {r.end: r for r in residents}
        assert set(self._idle) == {r.digest for r in residents if not r.pins}
        assert self._pinned == sorted(r.extent for r in residents if r.pins)
        ages = [self._residents[digest].used for digest in self._idle]
        assert ages == sorted(ages), "eviction order is not by age"
        assert all(-1 <= r.uses <= USES_MAX for r in residents)
        self._free.check()

    def units(self, spec: AdapterSpec) -> int:
        """How many it takes."""
        return max(1, -(-spec.packed_elements // self.unit_elements))

    def _make_room(self, units: int) -> int | None:
        """Evict until ``units`` neighbouring units are free; None if pins forbid it."""
        edges = [0, *(edge for extent in self._pinned for edge in extent), self.num_units]
        gaps = [
            (low, high)
            for low, high in zip(edges[::2], edges[1::2], strict=True)
            if high - low >= units
        ]
        if not gaps:
            return None
        victim, gap = self._victim(gaps)
        for doomed in self._window(victim, gap, units):
            self.evict(doomed)
        start = self._free.find(units)
        assert start is not None
        return start

    def _victim(self, gaps: list[tuple[int, int]]) -> tuple["_Resident", tuple[int, int]]:
        """Who in one of ``gaps`` is to leave first, and the gap it is in."""
        passed_over: list[_Resident] = []
        found = None
        for digest in self._idle:
            resident = self._residents[digest]
            index = bisect_right(gaps, (resident.start, self.num_units + 1)) - 1
            if index < 0 or resident.end > gaps[index][1]:
                continue
            candidate = resident, gaps[index]
            if resident.uses <= 0:
                found = candidate
                break
            passed_over.append(resident)
            if found is None or resident.uses < found[0].uses:
                found = candidate
        assert found is not None, "a wide enough gap between pins holds nothing and is not free"
        for resident in passed_over:
            resident.uses -= 1
            self._age(resident)
        return found

    def _age(self, resident: "_Resident") -> None:
        """Make an unpinned adapter the last to leave."""
        self._idle[resident.digest] = None
        self._idle.move_to_end(resident.digest)
        self._clock += 1
        resident.used = self._clock

    def _window(self, victim: "_Resident", gap: tuple[int, int], units: int) -> list[str]:
        """Digests to evict: the victim and neighbours, free or least worth first, until it fits."""
        doomed = [victim.digest]
        low, high = victim.extent
        while high - low < units:
            left = self._at_end.get(low) if low > gap[0] else None
            right = self._at_start.get(high) if high < gap[1] else None
            if low > gap[0] and left is None:
                low = self._free.start_of_end(low)
            elif high < gap[1] and right is None:
                high = self._free.end_of_start(high)
            elif right is None or (left is not None and left.worth < right.worth):
                assert left is not None
                doomed.append(left.digest)
                low = left.start
            else:
                doomed.append(right.digest)
                high = right.end
        return doomed


@dataclass(slots=True, eq=False)
class _Resident:
    digest: str
    start: int
    end: int
    pins: int
    uses: int  # after the first one, less those for which it was passed over; -1 before it
    used: int = 0  # tick since which it is where it is in the order; meaningful while unpinned

    @property
    def worth(self) -> tuple[int, int]:
        return self.uses, self.used

    @property
    def extent(self) -> tuple[int, int]:
        return self.start, self.end


class _FreeExtents:
    """The free part of the bank: coalesced extents, and the lowest one of at least some size.

    One heap of starts for each size; entries are dropped lazily, when ``_ends`` disagrees.
    """

    def __init__(self, num_units: int) -> None:
        self._ends: dict[int, int] = {}  # start -> end
        self._starts: dict[int, int] = {}  # end -> start
        self._heaps: dict[int, list[int]] = {}  # size -> starts, some of them stale
        self._entries = 0
        if num_units:
            self._insert(0, num_units)

    def extents(self) -> list[tuple[int, int]]:
        return list(self._ends.items())

    def end_of_start(self, start: int) -> int:
        return self._ends[start]

    def start_of_end(self, end: int) -> int:
        return self._starts[end]

    def find(self, units: int) -> int | None:
        """Lowest start of a free extent of at least ``units``."""
        heads = (self._head(size) for size in [s for s in self._heaps if s >= units])
        return min((head for head in heads if head is not None), default=None)

    def take(self, start: int, units: int) -> None:
        """Use the first ``units`` of the free extent at ``start``."""
        end = self._ends[start]
        assert end - start >= units
        self._remove(start)
        if start + units < end:
            self._insert(start + units, end)

    def give(self, start: int, end: int) -> None:
        """Free ``[start, end)`` and join it with its free neighbours."""
        if end in self._ends:
            tail = self._ends[end]
            self._remove(end)
            end = tail
        if start in self._starts:
            start = self._starts[start]
            self._remove(start)
        self._insert(start, end)

    def check(self) -> None:
        assert self._starts == {end: start for start, end in self._ends.items()}
        assert self._entries == sum(len(heap) for heap in self._heaps.values())
        assert self._entries <= 2 * len(self._ends) + 65, "stale entries pile up"
        for start, end in self._ends.items():
            assert start in self._heaps[end - start]

    def _head(self, size: int) -> int | None:
        heap = self._heaps[size]
        while heap and self._ends.get(heap[0]) != heap[0] + size:
            heappop(heap)
            self._entries -= 1
        if heap:
            return heap[0]
        del self._heaps[size]
        return None

    def _insert(self, start: int, end: int) -> None:
        self._ends[start] = end
        self._starts[end] = start
        heappush(self._heaps.setdefault(end - start, []), start)
        self._entries += 1
        if self._entries > 2 * len(self._ends) + 64:
            self._rebuild()

    def _remove(self, start: int) -> None:
        del self._starts[self._ends.pop(start)]

    def _rebuild(self) -> None:
        self._heaps = {}
        for start, end in self._ends.items():
            self._heaps.setdefault(end - start, []).append(start)
        for heap in self._heaps.values():
            heapify(heap)
        self._entries = len(self._ends)
