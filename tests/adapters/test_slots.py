"""The slot table: placement, pins and eviction, by example, exhaustively and at scale."""

from itertools import product
from random import Random

import pytest

from shoal.adapters.slots import SlotTable
from shoal.adapters.spec import AdapterSpec, Slot


def spec(digest: str, units: int = 1) -> AdapterSpec:
    return AdapterSpec(digest, "core", 4, None, packed_elements=units * 10)


def fill(table: SlotTable, *specs: AdapterSpec) -> None:
    for each in specs:
        assert table.acquire(each) is not None
        table.release(each.digest)


def test_first_acquire_loads_and_the_next_one_shares_the_place() -> None:
    table = SlotTable(4, 10)
    assert table.acquire(spec("a", 2)) == (Slot(0, 2), True)
    assert table.acquire(spec("a", 2)) == (Slot(0, 2), False)
    assert (table.num_resident, table.num_pinned) == (1, 1)


def test_elements_round_up_to_units() -> None:
    table = SlotTable(4, 10)
    acquired = table.acquire(AdapterSpec("a", "core", 4, None, packed_elements=11))
    assert acquired == (Slot(0, 2), True)


def test_a_released_adapter_stays_resident() -> None:
    table = SlotTable(4, 10)
    fill(table, spec("a"))
    assert table.resident("a")
    assert table.acquire(spec("a")) == (Slot(0, 1), False)


def test_least_recently_used_leaves_first() -> None:
    table = SlotTable(3, 10)
    fill(table, spec("a"), spec("b"), spec("c"), spec("a"))
    assert table.acquire(spec("d")) == (Slot(1, 1), True)
    assert [table.resident(d) for d in "abcd"] == [True, False, True, True]


def test_who_was_used_again_is_passed_over_once_for_each_time() -> None:
    table = SlotTable(2, 10)
    fill(table, spec("a"), spec("a"), spec("a"), spec("b"))
    for cold in "cd":  # a is the oldest, and was used again twice
        fill(table, spec(cold))
        assert table.resident("a")
    fill(table, spec("e"), spec("f"))
    assert not table.resident("a")


def test_many_that_are_used_once_do_not_flush_those_in_demand() -> None:
    """A hot adapter is used once in 150 steps, and 149 cold ones need places in a bank of 100."""
    table = SlotTable(100, 10)
    hot = [spec(f"hot{i}") for i in range(50)]
    fill(table, *hot, *hot, *hot, *hot)
    loads = 0
    for step in range(3000):
        if step % 3 == 0:
            each = hot[step // 3 % 50]
            acquired = table.acquire(each)
            assert acquired is not None
            loads += acquired[1]
            table.release(each.digest)
        else:
            fill(table, spec(f"cold{step}"))
    table.check()
    assert loads == 0  # by recency alone, every one of 1,000


def test_pinned_adapters_never_leave() -> None:
    table = SlotTable(2, 10)
    table.acquire(spec("a"))
    table.acquire(spec("b"))
    assert not table.evict("a")
    assert table.acquire(spec("c")) is None
    assert table.resident("a")
    assert table.resident("b")


def test_a_refused_acquire_evicts_nothing() -> None:
    table = SlotTable(5, 10)
    fill(table, spec("a"), spec("b"), spec("c"), spec("d"), spec("e"))
    table.acquire(spec("c"))
    assert table.acquire(spec("wide", 3)) is None
    assert table.num_resident == 5


def test_a_wide_adapter_evicts_neighbours_not_the_whole_bank() -> None:
    table = SlotTable(100, 10)
    fill(table, *(spec(f"a{i}") for i in Random(1).sample(range(100), 100)))
    assert table.acquire(spec("wide", 4)) is not None
    assert table.num_resident == 97
    table.check()


def test_a_wide_adapter_goes_between_pins_even_when_the_oldest_is_elsewhere() -> None:
    table = SlotTable(6, 10)
    fill(table, *(spec(d) for d in "abcdef"))
    table.acquire(spec("b"))  # leaves gaps of 1 (the oldest, a) and 4
    assert table.acquire(spec("wide", 4)) == (Slot(2, 4), True)
    assert table.resident("a")


def test_freed_neighbours_coalesce() -> None:
    table = SlotTable(3, 10)
    fill(table, spec("a"), spec("b"), spec("c"))
    assert all(table.evict(d) for d in "acb")
    assert table.acquire(spec("wide", 3)) == (Slot(0, 3), True)


def test_fits_speaks_of_an_empty_bank() -> None:
    table = SlotTable(2, 10)
    table.acquire(spec("a", 2))
    assert table.fits(spec("b", 2))
    assert not table.fits(spec("b", 3))
    assert not SlotTable(0, 10).fits(spec("b"))
    assert SlotTable(0, 10).acquire(spec("b")) is None


def test_evicting_what_is_not_there_says_so() -> None:
    assert not SlotTable(2, 10).evict("a")


def test_releasing_too_often_is_our_bug() -> None:
    table = SlotTable(2, 10)
    fill(table, spec("a"))
    with pytest.raises(AssertionError):
        table.release("a")


@pytest.mark.parametrize("units", [(-1, 1), (1, 0)])
def test_impossible_sizes_are_refused(units: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        SlotTable(*units)


def test_every_short_history_keeps_the_invariants() -> None:
    """Two units; adapters of one, one and two units; all histories of five operations."""
    specs = (spec("a", 1), spec("b", 1), spec("c", 2))
    operations = [(verb, each) for verb in ("acquire", "release", "evict") for each in specs]
    for history in product(operations, repeat=5):
        table, pins = SlotTable(2, 10), dict.fromkeys("abc", 0)
        for verb, each in history:
            digest = each.digest
            if verb == "acquire":
                blocked = any(
                    count
                    for other, count in pins.items()
                    if other != digest and "c" in other + digest
                )
                assert (table.acquire(each) is None) == blocked
                pins[digest] += not blocked
            elif verb == "release" and pins[digest]:
                table.release(digest)
                pins[digest] -= 1
            elif verb == "evict":
                leaves = table.resident(digest) and not pins[digest]
                assert table.evict(digest) == leaves
            assert all(table.resident(d) for d, count in pins.items() if count)
        table.check()


@pytest.mark.parametrize("seed", range(20))
def test_random_histories_keep_the_invariants(seed: int) -> None:
    rng = Random(seed)
    table = SlotTable(rng.randrange(1, 40), 10)
    held: list[str] = []
    for _ in range(300):
        name = f"a{rng.randrange(30)}"
        wanted = spec(name, 1 + int(name[1:]) % 7)
        if held and rng.random() < 0.5:
            table.release(held.pop(rng.randrange(len(held))))
        elif rng.random() < 0.1:
            table.evict(name)
        elif table.fits(wanted) and table.acquire(wanted) is not None:
            held.append(name)
        table.check()
        assert table.num_pinned == len(set(held))


def test_a_hundred_thousand_residents_churn_without_scanning_them() -> None:
    """20,000 evictions among 100,000 adapters; a scan of all for each would be 2e9 visits."""
    table = SlotTable(100_000, 10)
    for index in range(100_000):
        fill(table, spec(f"a{index}"))
    for index in range(20_000):
        fill(table, spec(f"b{index}", 1 + index % 3))
    table.check()
    assert table.resident("b19999")
    assert not table.resident("a0")
