"""Collections while serving: not of what stays, and no cycle is kept for good."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from shoal.server.garbage import BETWEEN_S, GROWTH_BUSY, Tidying, settled


class Cycle:
    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    gc.unfreeze()
    gc.disable()  # what is collected is collected by hand
    thresholds, callbacks = gc.get_threshold(), len(gc.callbacks)
    yield
    assert gc.get_threshold() == thresholds
    assert len(gc.callbacks) == callbacks
    gc.enable()


def frozen(thing: object) -> bool:
    return not any(thing is each for each in gc.get_objects())


def test_what_is_there_at_first_is_not_walked_and_comes_back() -> None:
    kept = Cycle()
    with settled():
        assert frozen(kept)
        later = Cycle()
        gc.collect()
        assert not frozen(later)
    assert not frozen(kept)


def test_what_survives_a_full_collection_is_not_walked_by_the_next() -> None:
    with settled(grows=True):
        kept, lost = Cycle(), weakref.ref(Cycle())
        assert lost() is not None
        gc.collect()
        assert lost() is None
        assert frozen(kept)
        gc.collect(1)  # of the young alone: nothing survives for good
        young = Cycle()
        gc.collect(1)
        assert not frozen(young)


def test_full_collections_come_by_themselves_however_much_there_was() -> None:
    # Regression: the first one waited until a quarter of that had come, and walked as much.
    old = [[i] for i in range(400_000)]
    gc.enable()
    with settled(grows=True):
        first = Cycle()
        hoard = [[i] for i in range(60_000)]
        assert frozen(first)
        assert frozen(hoard[0])
    assert old


def test_cycles_that_die_frozen_are_found_when_there_is_time() -> None:
    now = 0.0
    tidy = Tidying(lambda: now)
    with settled(grows=True):
        now += BETWEEN_S
        assert not tidy()  # it has seen how much there is
        thing = Cycle()
        gone = weakref.ref(thing)
        hoard = [[i] for i in range(gc.get_freeze_count())]
        gc.collect()
        del thing
        gc.collect()
        assert gone() is not None
        now += BETWEEN_S / 2
        assert not tidy()
        now += BETWEEN_S / 2
        assert tidy()
        assert gone() is None
        assert frozen(hoard)
        now += BETWEEN_S
        assert not tidy()  # no more than there was


def test_nothing_is_done_where_nothing_is_frozen() -> None:
    now = 0.0
    tidy = Tidying(lambda: now)
    now += BETWEEN_S
    gone = weakref.ref(Cycle())
    assert not tidy()
    assert gone() is not None


def test_cycles_that_die_frozen_do_not_add_up_where_there_is_never_time() -> None:
    with settled(grows=True):
        before = gc.get_freeze_count()
        gone = None
        for _ in range(80):
            # In flight while a collection runs, and lost later.
            flight = [Cycle() for _ in range(before // 10)]
            gone = gone or weakref.ref(flight[0])
            gc.collect()
            assert gc.get_freeze_count() < (GROWTH_BUSY + 1) * before
        assert gone is not None
        assert gone() is None
        assert frozen(flight[0])
