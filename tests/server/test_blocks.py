"""The block pool: who holds what, and what is reused first."""

from itertools import product

import pytest

from shoal.server.engine.blocks import BlockPool


def test_every_short_history_of_three_blocks_keeps_the_invariants() -> None:
    """Two holders take, share, mark and release; all histories of six operations."""
    operations = ("take 0", "take 1", "share 0 1", "keep 0", "drop 0", "drop 1")
    for history in product(operations, repeat=6):
        pool = BlockPool(3, 4)
        held: tuple[list[int], list[int]] = ([], [])
        for operation in history:
            verb, *who = operation.split()
            mine = held[int(who[0])]
            if verb == "take" and pool.num_available:
                mine += pool.allocate(1)
            elif verb == "share" and mine:
                pool.share(mine[-1])
                held[1].append(mine[-1])
            elif verb == "keep" and mine:
                pool.keep(mine[-1])
            elif verb == "drop":
                pool.release(tuple(mine))
                mine.clear()
        pool.check([*held[0], *held[1]])
        assert pool.num_used == len({*held[0], *held[1]})


def test_blocks_for_rounds_up() -> None:
    pool = BlockPool(3, 4)
    assert [pool.blocks_for(n) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_free_blocks_go_before_idle_ones() -> None:
    pool = BlockPool(3, 4)
    kept, plain = pool.allocate(2)
    pool.keep(kept)
    pool.release((kept, plain))
    assert kept not in pool.allocate(2)
    assert pool.allocate(1) == (kept,)


def test_idle_blocks_leave_oldest_first_and_ends_before_beginnings() -> None:
    evicted: list[int] = []
    pool = BlockPool(4, 4)
    pool.on_evict = evicted.append
    first, second = pool.allocate(2), pool.allocate(2)
    for block_id in first + second:
        pool.keep(block_id)
    pool.release(first)
    pool.release(second)
    pool.allocate(4)
    assert evicted == [first[1], first[0], second[1], second[0]]


def test_a_shared_idle_block_is_no_longer_available() -> None:
    pool = BlockPool(2, 4)
    (block_id,) = pool.allocate(1)
    pool.keep(block_id)
    pool.release((block_id,))
    assert pool.available_beside((block_id,)) == 1
    pool.share(block_id)
    assert pool.num_available == 1
    assert pool.available_beside((block_id,)) == 1
    pool.check([block_id])


def test_allocating_without_asking_and_releasing_twice_are_our_bugs() -> None:
    pool = BlockPool(1, 4)
    held = pool.allocate(1)
    with pytest.raises(AssertionError):
        pool.allocate(1)
    pool.release(held)
    with pytest.raises(AssertionError):
        pool.release(held)


@pytest.mark.parametrize("size", [(0, 4), (4, 0)])
def test_impossible_sizes_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BlockPool(*size)
