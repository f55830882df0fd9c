"""Bytes go when nobody refers to them, and never while somebody does or is about to."""

import hashlib
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import select
from tests.adapters.databases import BASE, content

from shoal.adapters.registry.catalog import AdapterInfo, Catalog, Content
from shoal.adapters.registry.database import Database
from shoal.adapters.registry.errors import RegistryUnavailable
from shoal.adapters.registry.registry import Registry
from shoal.adapters.registry.store import open_store
from shoal.adapters.registry.tables import GARBAGE


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def catalog(database: Database) -> Catalog:
    return Catalog(database, base_digest=BASE)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(database_url: str, tmp_path: Path, clock: Clock) -> Iterator[Registry]:
    store = open_store(str(tmp_path / "store"))
    registry = Registry(Database(database_url), store, base_digest=BASE, clock=clock)
    yield registry
    registry.check()
    registry.close()


def publish(registry: Registry, name: str, data: bytes) -> AdapterInfo:
    digest = hashlib.sha256(data).hexdigest()
    made = Content(digest, "core", "lora_xs", 8, len(data), 13_440, None)
    return registry.publish(name, made, data)


def test_random_changes_agree_with_counting_references(catalog: Catalog) -> None:
    rng = random.Random(0)
    live: dict[str, set[str]] = {}
    died: dict[str, int] = {}
    for step in range(150):
        name = rng.choice("abcd")
        if rng.random() < 0.6:
            what = content(rng.randrange(6))
            catalog.publish(name, what, created=step)
            live.setdefault(name, set()).add(what.digest)
        elif name in live:
            catalog.delete(name, now=step)
            died |= dict.fromkeys(live.pop(name), step)
        referred = set().union(*live.values()) if live else set()
        older_than = rng.randrange(step + 2)
        expected = {d for d, when in died.items() if when < older_than and d not in referred}
        # A digest that came back and died again counts from the second time.
        found = catalog.collectable(older_than)
        assert set(found) == expected, step
        assert len(found) == len(set(found))
        if step % 10 == 0:
            removed: list[str] = []
            everything = sorted(died)
            count = catalog.forget(everything, older_than=older_than, remove_bytes=removed.append)
            assert (set(removed), len(removed)) == (expected, count)
            died = {d: when for d, when in died.items() if d not in expected}
            assert catalog.collectable(older_than) == []
        died = {d: when for d, when in died.items() if d not in referred}
    catalog.check()


def test_only_the_grace_period_and_the_last_reference_decide(catalog: Catalog) -> None:
    one = content(1)
    catalog.publish("a", one, created=0.0)
    catalog.publish("b", one, created=0.0)
    catalog.delete("a", now=10.0)
    assert catalog.collectable(1e9) == []
    catalog.delete("b", now=20.0)
    assert catalog.collectable(20.0) == []
    assert catalog.collectable(20.5) == [one.digest]
    catalog.spare(one.digest, now=30.0)
    assert catalog.collectable(20.5) == []
    assert catalog.forget([one.digest], older_than=20.5, remove_bytes=pytest.fail) == 0
    catalog.spare("0" * 64, now=30.0)  # nobody knows it: nothing happens
    assert catalog.collectable(1e9) == [one.digest]


def test_another_base_or_owner_keeps_bytes_too(database: Database, catalog: Catalog) -> None:
    catalog.publish("a", content(1), created=0.0)
    Catalog(database, base_digest="c" * 64, owner="ann").publish("x", content(1), created=0.0)
    catalog.delete("a", now=1.0)
    assert catalog.collectable(1e9) == []


def test_a_clock_that_goes_backwards_never_shortens_the_grace(catalog: Catalog) -> None:
    for name in "ab":
        catalog.publish(name, content(1), created=0.0)
    catalog.delete("a", now=100.0)
    catalog.delete("b", now=5.0)
    catalog.spare(content(1).digest, now=6.0)
    assert catalog.collectable(100.0) == []
    assert catalog.collectable(100.5) == [content(1).digest]


def test_what_the_store_does_not_remove_stays_collectable(catalog: Catalog) -> None:
    for seed in range(3):
        catalog.publish(f"a{seed}", content(seed), created=0.0)
        catalog.delete(f"a{seed}", now=1.0)
    digests = catalog.collectable(2.0)

    def fail_at_second(digest: str) -> None:
        if digest == digests[1]:
            raise RegistryUnavailable("the store is away")

    with pytest.raises(RegistryUnavailable, match="away"):
        catalog.forget(digests, older_than=2.0, remove_bytes=fail_at_second)
    assert catalog.collectable(2.0) == digests[1:]


def test_collecting_removes_dead_bytes_and_no_others(registry: Registry, clock: Clock) -> None:
    for number in range(5):
        publish(registry, f"a{number}", b"%d" % (number // 2))
    kept = publish(registry, "a0", b"kept")
    for name in ("a1", "a2", "a3"):
        registry.delete(name)
    clock.now += 100.0
    assert registry.collect(grace_s=200.0) == 0
    assert registry.collect(grace_s=50.0) == 1  # only b"1": a0 still has b"0"
    assert registry.collect(grace_s=50.0) == 0
    assert registry.read(kept.digest) == b"kept"
    assert registry.read(hashlib.sha256(b"0").hexdigest()) == b"0"
    store = registry._store
    assert not store.exists(hashlib.sha256(b"1").hexdigest())
    assert registry.read(publish(registry, "a1", b"1").digest) == b"1"


def test_what_is_not_garbage_after_all_is_forgotten_as_such(
    registry: Registry, clock: Clock
) -> None:
    for name in "ab":
        publish(registry, name, b"shared")
    registry.delete("a")
    clock.now += 100.0
    assert registry.collect(grace_s=50.0) == 0
    with registry._database.read() as connection:
        assert not connection.execute(select(GARBAGE)).all()
    assert registry.read(hashlib.sha256(b"shared").hexdigest()) == b"shared"


def test_an_upload_waits_while_its_bytes_are_removed(
    registry: Registry, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would see them, not write them again, and name what is then gone."""
    publish(registry, "a", b"same")
    registry.delete("a")
    clock.now += 100.0
    removing, go_on = threading.Event(), threading.Event()
    store = registry._store
    delete = store.delete

    def slow(digest: str) -> None:
        removing.set()
        go_on.wait(20.0)
        delete(digest)

    monkeypatch.setattr(store, "delete", slow)
    with ThreadPoolExecutor(2) as pool:
        collecting = pool.submit(registry.collect, grace_s=50.0)
        assert removing.wait(20.0)
        uploading = pool.submit(publish, registry, "b", b"same")
        time.sleep(0.3)
        assert not uploading.done()
        go_on.set()
        assert collecting.result(20.0) == 1
        assert registry.read(uploading.result(20.0).digest) == b"same"


def test_uploads_deletions_and_collections_at_once_never_lose_bytes(
    registry: Registry, clock: Clock
) -> None:
    """The clock stands still in each change, so that it is shorter than the grace period."""
    stop = threading.Event()
    changes = threading.Semaphore(4)

    def change(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(25):
            name = f"{seed}-{rng.randrange(2)}"
            with changes:
                info = publish(registry, name, b"%d" % rng.randrange(3))
                assert registry.read(info.digest)
            if rng.random() < 0.7:
                with changes:
                    registry.delete(name)

    def collect() -> int:
        removed = 0
        while not stop.is_set():
            for _ in range(4):  # nobody changes anything while time passes
                changes.acquire()
            clock.now += 1.0
            for _ in range(4):
                changes.release()
            removed += registry.collect(grace_s=0.5)
        return removed

    with ThreadPoolExecutor(5) as pool:
        collecting = pool.submit(collect)
        changing = [pool.submit(change, seed) for seed in range(4)]
        try:
            for future in changing:
                future.result(60.0)
        finally:
            stop.set()
        assert collecting.result(60.0) > 0
    for info in registry.page(limit=100)[0]:
        assert registry.read(info.digest)
