"""Use times: written once a minute, and never in a request's way."""

import threading
import time

import pytest
from tests.adapters.databases import BASE, content

from shoal.adapters.registry.catalog import Catalog
from shoal.adapters.registry.database import Database
from shoal.adapters.registry.usage import INTERVAL_S, UseRecorder


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def catalog(database: Database) -> Catalog:
    catalog = Catalog(database, base_digest=BASE)
    for name in "abc":
        catalog.publish(name, content(name), created=0.0)
    return catalog


def test_an_adapter_is_written_at_most_once_a_minute(database: Database, catalog: Catalog) -> None:
    clock = Clock()
    here, elsewhere = (UseRecorder(database, clock=clock) for _ in range(2))
    assert catalog.get("a").used is None
    here.note("", "a")
    here.note("", "gone")
    here.flush()
    assert catalog.get("a").used == 1000.0
    clock.now += INTERVAL_S - 1
    elsewhere.note("", "a")
    elsewhere.note("", "b")
    elsewhere.flush()
    assert (catalog.get("a").used, catalog.get("b").used) == (1000.0, clock.now)
    clock.now += 1
    here.note("", "a")
    here.flush()
    assert catalog.get("a").used == clock.now
    clock.now -= 500
    here.note("", "a")
    here.close()
    elsewhere.close()
    assert catalog.get("a").used == clock.now + 500, "a clock that goes backwards changes nothing"
    assert catalog.get("c").used is None
    catalog.delete("a", now=0.0)
    assert catalog.publish("a", content("a"), created=0.0).used is None


def test_a_name_of_another_owner_is_not_touched(database: Database, catalog: Catalog) -> None:
    Catalog(database, base_digest=BASE, owner="ann").publish("a", content(1), created=0.0)
    recorder = UseRecorder(database)
    recorder.note("ann", "a")
    recorder.close()
    assert catalog.get("a").used is None


def test_noting_neither_fails_nor_waits_while_the_database_is_locked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: object
) -> None:
    monkeypatch.setattr("shoal.adapters.registry.database.BUSY_TIMEOUT_S", 0.05)
    url = f"sqlite:///{tmp_path}/registry.db"
    one, two = Database(url), Database(url)
    Catalog(one, base_digest=BASE).publish("a", content(1), created=0.0)
    recorder = UseRecorder(two, interval_s=0.01)
    with one.write():
        start = time.perf_counter()
        for _ in range(1000):
            recorder.note("", "a")
        assert time.perf_counter() - start < 0.5
        deadline = time.monotonic() + 10
        while "not written" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "locked" in caplog.text
    recorder.note("", "a")
    recorder.close()
    assert Catalog(one, base_digest=BASE).get("a").used is not None, "and goes on afterwards"
    one.close()
    two.close()


def test_what_is_noted_is_bounded_and_written_in_batches(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.adapters.registry.usage.NOTED_MAX", 1200)
    catalog = Catalog(database, base_digest=BASE)
    for name in ("n0", "n1199", "n1200"):
        catalog.publish(name, content(name), created=0.0)
    recorder = UseRecorder(database)
    batches = []
    transact = database.transact
    monkeypatch.setattr(database, "transact", lambda work: batches.append(transact(work)))
    for number in range(2000):
        recorder.note("", f"n{number}")
    recorder.close()
    assert len(batches) == 3
    used = [catalog.get(name).used is not None for name in ("n0", "n1199", "n1200")]
    assert used == [True, True, False]
    assert not [t for t in threading.enumerate() if t.name == "adapter-use"]
