"""What stays resident: bytes and pins always hold, and the policy beats LRU where it should."""

import random
from bisect import bisect_left
from collections import OrderedDict
from itertools import accumulate

import pytest

from shoal.adapters.residency import Residency


class Lru:
    """What ``Residency`` replaces, for comparison."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.sizes: OrderedDict[str, int] = OrderedDict()
        self.used = 0

    def __contains__(self, key: str) -> bool:
        return key in self.sizes

    def use(self, key: str) -> None:
        self.sizes.move_to_end(key)

    def add(self, key: str, size: int) -> None:
        while self.used + size > self.capacity:
            self.used -= self.sizes.popitem(last=False)[1]
        self.sizes[key] = size
        self.used += size


def hit_rate(cache: Residency | Lru, keys: list[str], sizes: dict[str, int]) -> float:
    hits = 0
    for key in keys:
        if key in cache:
            hits += 1
            cache.use(key)
        else:
            cache.add(key, sizes[key])
    return hits / len(keys)


def zipf(count: int, exponent: float, length: int, rng: random.Random) -> list[str]:
    cumulative = list(accumulate(1 / (n + 1) ** exponent for n in range(count)))
    return [f"k{bisect_left(cumulative, rng.random() * cumulative[-1])}" for _ in range(length)]


@pytest.mark.parametrize("exponent", [0.7, 0.9, 1.1])
@pytest.mark.parametrize("share", [0.01, 0.1])
@pytest.mark.parametrize("seed", range(2))
def test_on_a_zipf_workload_it_hits_more_often_than_lru(
    exponent: float, share: float, seed: int
) -> None:
    rng = random.Random(seed)
    keys = zipf(5000, exponent, 40_000, rng)
    sizes = {f"k{n}": rng.choice([1, 1, 1, 2, 8]) for n in range(5000)}
    capacity = int(sum(sizes.values()) * share)
    ours = hit_rate(Residency(capacity), keys, sizes)
    lru = hit_rate(Lru(capacity), keys, sizes)
    assert ours > lru + 0.01, (ours, lru)


def test_a_scan_of_cold_keys_does_not_flush_the_hot_ones() -> None:
    ours, lru = Residency(1000), Lru(1000)
    for cache in (ours, lru):
        for _ in range(4):
            for n in range(800):
                if f"hot{n}" in cache:
                    cache.use(f"hot{n}")
                else:
                    cache.add(f"hot{n}", 1)
        for n in range(20_000):
            cache.add(f"cold{n}", 1)
    assert sum(f"hot{n}" in lru for n in range(800)) == 0
    assert sum(f"hot{n}" in ours for n in range(800)) == 800
    ours.check()


def test_a_scan_that_pins_what_it_touches_does_not_either() -> None:
    """As requests do: pinned while they run, and unpinned once."""
    cache = Residency(1000)
    for _ in range(4):
        for n in range(800):
            if f"hot{n}" in cache:
                cache.pin(f"hot{n}")
            else:
                cache.add(f"hot{n}", 1, pin=True)
            cache.unpin(f"hot{n}")
    for n in range(20_000):
        cache.add(f"cold{n}", 1, pin=True)
        cache.unpin(f"cold{n}")
    assert all(f"hot{n}" in cache for n in range(800))


def test_what_was_hot_gives_way_to_what_is() -> None:
    cache = Residency(100)
    for epoch in range(5):
        for _ in range(10):
            for n in range(60):
                key = f"{epoch}.{n}"
                if key in cache:
                    cache.use(key)
                else:
                    cache.add(key, 1)
        assert sum(f"{epoch}.{n}" in cache for n in range(60)) >= 55


def test_one_large_key_takes_the_place_of_many() -> None:
    cache = Residency(100)
    for n in range(100):
        cache.add(f"k{n}", 1)
    assert len(cache.add("large", 90)) == 90
    assert "large" in cache
    cache.check()


def test_only_what_is_pinned_can_stand_in_the_way() -> None:
    cache = Residency(100)
    cache.add("pinned", 60, pin=True)
    cache.add("idle", 40)
    assert cache.room(40)
    assert not cache.room(41)
    assert cache.add("new", 40) == ["idle"]
    with pytest.raises(AssertionError, match="not pinned"):
        cache.unpin("new")


@pytest.mark.parametrize("seed", range(30))
def test_random_histories_keep_the_invariants(seed: int) -> None:
    rng = random.Random(seed)
    cache = Residency(rng.randrange(1, 60))
    held: list[str] = []
    for _ in range(400):
        key = f"k{rng.randrange(40)}"
        action = rng.random()
        if key in cache:
            if action < 0.3:
                cache.use(key)
            else:
                cache.pin(key)
                held.append(key)
        elif cache.room(size := rng.randrange(1, 20)):
            pin = action < 0.3
            victims = cache.add(key, size, pin=pin)
            assert not set(victims) & set(held)
            held += [key] if pin else []
        while len(held) > 4:
            cache.unpin(held.pop(rng.randrange(len(held))))
        assert all(key in cache for key in held)
        cache.check()


def test_a_million_keys_churn_in_constant_time_each() -> None:
    """300,000 operations among 200,000 keys; a scan of them for each would be 6e10 visits."""
    cache = Residency(200_000)
    for n in range(200_000):
        cache.add(f"a{n}", 1, pin=n % 4 == 0)
    for n in range(100_000):
        cache.add(f"b{n}", 1)
    assert len(cache) == 200_000
    assert all(f"a{n}" in cache for n in range(0, 200_000, 4))
