"""When the interpreter looks for reference cycles, so that no stream waits for it.

A full collection walks every object there is, at half a microsecond each and more, while all
threads stand still: 60 ms were seen beside 5,000 resident adapters. Almost all objects live for as
long as the process. So what has survived one full collection is not walked by the next
(``gc.freeze``), which then costs what came since, a few milliseconds. Cycles that were alive then
and die later, such as those of a request in flight, are found in idle moments; where there are
none, when so many objects have come that some of them must be such.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

# Of new objects: after so many the youngest are walked, after so many of those their survivors, and
# after so many of those everything that is not frozen: 10,000 objects, some 5 ms.
THRESHOLDS = (1000, 5, 2)
# Everything is walked in an idle moment when this much more is frozen than the last time.
GROWTH = 1.25
BETWEEN_S = 60.0
# And in the middle of work when this many times as much is: cycles do not add up beyond that.
GROWTH_BUSY = 3.0


@contextmanager
def settled(*, grows: bool = False) -> Iterator[None]:
    """What there is now is not walked by each collection, which would hold up every stream.

    Args:
        grows: nor is what survives later ones, in a process that keeps ever more. Then ``Tidying``
            belongs to it.
    """
    thresholds = gc.get_threshold()
    _collect_and_freeze()
    survivors = _Survivors()
    if grows:
        gc.set_threshold(*THRESHOLDS)
        gc.callbacks.append(survivors)
    try:
        yield
    finally:
        if grows:
            gc.callbacks.remove(survivors)
            gc.set_threshold(*thresholds)
        gc.unfreeze()


def _collect_and_freeze() -> None:
    gc.collect()
    gc.freeze()
    # The interpreter puts a full collection off until a quarter of what the last one left has come:
    # this one leaves nothing.
    gc.collect()


class _Survivors:
    """Freezes what survives a full collection."""

    def __init__(self) -> None:
        self._frozen = gc.get_freeze_count()
        self._most = GROWTH_BUSY * self._frozen
        self._everything = False

    def __call__(self, phase: str, info: Mapping[str, int]) -> None:
        if info["generation"] != 2:
            return
        if phase == "start":
            # The sum is too large by what has died; to count what is there takes milliseconds.
            if self._frozen > self._most:
                self._frozen = gc.get_freeze_count()
                if self._frozen > self._most:
                    self._everything = True
                    self._frozen = 0
                    gc.unfreeze()  # to be walked by this one
            return
        self._frozen += len(gc.get_objects(generation=2))
        gc.freeze()
        if self._everything:
            self._everything = False
            self._most = GROWTH_BUSY * self._frozen


class Tidying:
    """Finds the cycles among what was frozen, when called in idle moments.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next_s = clock() + BETWEEN_S
        self._least = 0.0

    def __call__(self) -> bool:
        """Collect everything if that is due; nothing where nothing is frozen.

        Returns:
            Whether it did.
        """
        now = self._clock()
        if now < self._next_s:
            return False
        self._next_s = now + BETWEEN_S
        frozen = gc.get_freeze_count()
        if not frozen:
            return False
        if not self._least:  # what was there when serving began
            self._least = GROWTH * frozen
        if frozen < self._least:
            return False
        gc.unfreeze()
        _collect_and_freeze()
        self._least = GROWTH * gc.get_freeze_count()
        return True
