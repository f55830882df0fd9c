"""Pieces of page-locked memory: never two tensors in one, and used again."""

import gc
import random
import threading

import pytest
import torch
from torch import Tensor

from shoal.adapters import pinned
from shoal.adapters.pinned import PIECE_BYTES_MAX, SLAB_BYTES, PinnedSlabs


class Driver:
    """Ordinary memory, counted."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def allocate(self, num_bytes: int) -> Tensor:
        self.calls.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("elements", [1, 1000, 2048, 57_344])
def test_a_copy_has_the_same_bits(driver: Driver, dtype: torch.dtype, elements: int) -> None:
    data = torch.randn(elements).to(dtype)
    copy = PinnedSlabs(driver.allocate).copied(data)
    assert copy.dtype == dtype
    assert torch.equal(copy, data)
    assert copy.data_ptr() != data.data_ptr()


def test_many_are_alive_at_once_and_each_keeps_its_values(driver: Driver) -> None:
    slabs = PinnedSlabs(driver.allocate)
    rng = random.Random(0)
    alive: dict[int, Tensor] = {}
    for number in range(2000):
        alive[number] = slabs.copied(torch.full((rng.randint(1, 9000),), number))
        if len(alive) > 100:
            del alive[rng.choice(list(alive))]
        if number % 97 == 0:
            assert all(bool((copy == value).all()) for value, copy in alive.items())
    assert driver.calls.count(SLAB_BYTES) == len(driver.calls) <= 8, "used again, size by size"


def test_a_slab_serves_as_many_as_fit(driver: Driver) -> None:
    slabs = PinnedSlabs(driver.allocate)
    kept = [slabs.copied(torch.zeros(100_000, dtype=torch.uint8)) for _ in range(64)]
    assert driver.calls == [SLAB_BYTES]
    kept.append(slabs.copied(torch.zeros(100_000, dtype=torch.uint8)))
    assert driver.calls == [SLAB_BYTES] * 2
    del kept
    gc.collect()
    again = [slabs.copied(torch.zeros(100_000, dtype=torch.uint8)) for _ in range(128)]
    assert len({copy.data_ptr() for copy in again}) == 128
    assert driver.calls == [SLAB_BYTES] * 2


def test_large_ones_are_asked_for_alone(driver: Driver) -> None:
    data = torch.ones(PIECE_BYTES_MAX + 1, dtype=torch.uint8)
    assert torch.equal(PinnedSlabs(driver.allocate).copied(data), data)
    assert driver.calls == [PIECE_BYTES_MAX + 1]


def test_threads_do_not_share_a_piece(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "SLAB_BYTES", 64 << 10)
    slabs = PinnedSlabs(driver.allocate)
    wrong = []

    def work(number: int) -> None:
        kept = []
        for turn in range(300):
            kept.append(slabs.copied(torch.full((1000,), number * 1000 + turn)))
            if len(kept) > 5:
                copy = kept.pop(0)
                if not bool((copy == copy[0]).all()) or int(copy[0]) // 1000 != number:
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
