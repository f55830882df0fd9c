"""When the interpreter looks for reference cycles, so that no stream waits for it.

A full collection walks every object there is, at about half a microsecond each: 60 ms beside 7,000
resident adapters, while all threads stand still. Almost all of them live for as long as the
process. So what has survived one full collection is not walked by the next (``gc.freeze``), which
then costs what came since, a few milliseconds. Cycles that were alive then and die later are found
in idle moments.
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


@contextmanager
def settled(*, grows: bool = False) -> Iterator[None]:
    """What there is now is not walked by each collection, which would hold up every stream.

    Args:
        grows: nor is what survives later ones, in a process that keeps ever more. Then ``Tidying``
            belongs to it.
    """
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()
    if grows:
        gc.set_threshold(*THRESHOLDS)
        gc.callbacks.append(_freeze_survivors)
    try:
        yield
    finally:
        if grows:
            gc.callbacks.remove(_freeze_survivors)
            gc.set_threshold(*thresholds)
        gc.unfreeze()


def _freeze_survivors(phase: str, info: Mapping[str, int]) -> None:
    if phase == "stop" and info["generation"] == 2:
        gc.freeze()


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
        gc.collect()
        gc.freeze()
        self._least = GROWTH * gc.get_freeze_count()
        return True
