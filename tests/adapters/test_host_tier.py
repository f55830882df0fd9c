"""The host tier keeps what is pinned, counts bytes, and survives many threads."""

import random
import threading

import pytest
import torch

from shoal.adapters.errors import AdapterTooLarge
from shoal.adapters.host_tier import HostTier
from shoal.adapters.packing import PackedAdapter
from shoal.adapters.spec import AdapterSpec


def packed(name: str, elements: int = 10) -> PackedAdapter:
    """``4 * elements`` bytes."""
    return PackedAdapter(AdapterSpec(name, "lora", 1, None, elements), torch.zeros(elements))


def test_an_entry_that_was_used_once_and_is_unpinned_leaves_first() -> None:
    tier = HostTier(120)
    for name in "abc":
        tier.put(packed(name))
    assert tier.pin("a")
    assert tier.pin("b")
    tier.unpin("b")
    tier.put(packed("d"))  # b was used again, and a is pinned
    assert [name for name in "abcd" if tier.pin(name)] == ["a", "b", "d"]
    assert tier.used_bytes == 120
    tier.check()


def test_an_entry_is_pinned_once_per_pin() -> None:
    tier = HostTier(40)
    tier.put(packed("a"), pin=True)
    assert tier.pin("a")
    tier.unpin("a")
    with pytest.raises(AdapterTooLarge):
        tier.put(packed("b"))
    tier.unpin("a")
    tier.put(packed("b"))
    assert not tier.pin("a")
    tier.check()


def test_refusal_changes_nothing() -> None:
    tier = HostTier(120)
    tier.put(packed("old"))
    tier.put(packed("kept"), pin=True)
    with pytest.raises(AdapterTooLarge, match="84 bytes"):
        tier.put(packed("large", 21))
    assert len(tier) == 2
    assert tier.used_bytes == 80
    assert tier.get("old").spec.digest == "old"
    tier.check()


def test_putting_again_keeps_one_copy() -> None:
    tier = HostTier(100)
    first = packed("a")
    tier.put(first)
    tier.put(packed("a"))
    assert tier.used_bytes == 40
    assert tier.get("a") is first


def test_absent_entries() -> None:
    tier = HostTier(100)
    assert not tier.pin("a")
    with pytest.raises(KeyError):
        tier.get("a")
    with pytest.raises(AssertionError, match="not pinned"):
        tier.unpin("a")


def test_capacity_must_be_positive() -> None:
    with pytest.raises(ValueError, match="capacity_bytes is 0"):
        HostTier(0)


def test_invariants_hold_under_many_threads() -> None:
    tier = HostTier(400)
    failures: list[BaseException] = []
    start = threading.Barrier(6)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        held: list[str] = []
        try:
            start.wait()
            for _ in range(400):
                name = f"a{rng.randrange(20)}"
                action = rng.random()
                if action < 0.4:
                    try:
                        pin = rng.random() < 0.3
                        tier.put(packed(name, 5 + int(name[1:])), pin=pin)
                        held += [name] if pin else []
                    except AdapterTooLarge:
                        pass
                elif action < 0.7:
                    held += [name] if tier.pin(name) else []
                elif held:
                    tier.unpin(held.pop(rng.randrange(len(held))))
                for mine in held:
                    assert tier.get(mine).spec.digest == mine
                if len(held) > 2:
                    tier.unpin(held.pop())
                tier.check()
            for mine in held:
                tier.unpin(mine)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    tier.check()
    tier.put(packed("all", 100))  # everything has been released, so the whole tier is free
    assert tier.used_bytes == 400
