"""Live requests by the time at which each is of no use any more. Pure."""

from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.server.engine.sequence import Sequence


class Deadlines:
    """A heap. Requests that end early stay in it for a while, at most as many as the live ones."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Sequence]] = []
        self._live = 0

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, deadline_s: float, seq: "Sequence") -> None:
        """``seq`` is of no use from ``deadline_s`` on."""
        heappush(self._heap, (deadline_s, seq.order, seq))
        self._live += 1

    def forget(self) -> None:
        """One of those added has ended."""
        self._live -= 1
        if len(self._heap) > 2 * self._live + 64:
            self._heap = [entry for entry in self._heap if not entry[2].ended]
            heapify(self._heap)

    def passed(self, now_s: float) -> list["Sequence"]:
        """Those that have not ended though their time has come; the caller ends them now."""
        late = []
        while self._heap and self._heap[0][0] <= now_s:
            seq = heappop(self._heap)[2]
            if not seq.ended:
                late.append(seq)
        return late
