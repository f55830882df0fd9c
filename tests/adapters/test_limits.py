"""How many adapters and bytes an owner may have: exact, whoever else uploads."""

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import select, text
from tests.adapters.databases import BASE, content

from shoal.adapters.errors import AdapterNotFound, AdapterQuotaExceeded
from shoal.adapters.registry.bulk import Adapter, Version, publish_many
from shoal.adapters.registry.catalog import Catalog, Content
from shoal.adapters.registry.database import Database
from shoal.adapters.registry.keys import Limits
from shoal.adapters.registry.registry import Registry
from shoal.adapters.registry.store import LocalStore
from shoal.adapters.registry.tables import OWNERS

OTHER_BASE = "c" * 64


def sized(seed: int | str, size: int) -> Content:
    return replace(content(seed), bytes=size)


def owners(database: Database) -> dict[str, tuple[int, int]]:
    with database.read() as connection:
        rows = connection.execute(select(OWNERS)).all()
    return {row.owner: (row.names, row.bytes) for row in rows}


@pytest.fixture
def catalog(database: Database) -> Catalog:
    return Catalog(database, base_digest=BASE, owner="ann")


def test_names_up_to_the_limit_and_no_further(catalog: Catalog, database: Database) -> None:
    limits = Limits(adapters=2)
    for name in "ab":
        catalog.publish(name, content(name), created=0.0, limits=limits)
    with pytest.raises(AdapterQuotaExceeded) as caught:
        catalog.publish("c", content("c"), created=0.0, limits=limits)
    error = caught.value
    assert (error.limit, error.allowed, error.used, error.needed) == ("adapters", 2, 2, 1)
    assert "limit is 2 adapters: 2 are in use, and this needs 1 more" in str(error)
    assert catalog.publish("a", content("a2"), created=0.0, limits=limits).version == 2
    other_base = Catalog(database, base_digest=OTHER_BASE, owner="ann")
    with pytest.raises(AdapterQuotaExceeded):
        other_base.publish("c", content("c"), created=0.0, limits=limits)
    other_owner = Catalog(database, base_digest=BASE, owner="bob")
    other_owner.publish("c", content("c"), created=0.0, limits=limits)
    catalog.publish("c", content("c"), created=0.0)
    catalog.delete("b", now=0.0)
    catalog.delete("a", now=0.0)
    assert catalog.publish("b", content("b"), created=0.0, limits=limits).version == 2
    catalog.check()


def test_bytes_are_those_of_all_versions_and_the_limit_is_exact(catalog: Catalog) -> None:
    limits = Limits(bytes=1000)
    catalog.publish("a", sized(1, 400), created=0.0, limits=limits)
    catalog.publish("a", sized(2, 500), created=0.0, limits=limits)
    with pytest.raises(AdapterQuotaExceeded) as caught:
        catalog.publish("a", sized(3, 101), created=0.0, limits=limits)
    error = caught.value
    assert (error.limit, error.allowed, error.used, error.needed) == ("bytes", 1000, 900, 101)
    assert catalog.publish("a", sized(4, 100), created=0.0, limits=limits).version == 3
    assert catalog.publish("b", sized(5, 0), created=0.0, limits=limits).version == 1
    catalog.delete("a", now=0.0)
    assert catalog.publish("b", sized(6, 1000), created=0.0, limits=limits).version == 2
    catalog.check()


def test_what_is_there_already_needs_no_room(catalog: Catalog) -> None:
    for number in (1, 2):
        catalog.publish("a", content(number), created=0.0)
    tight = Limits(adapters=0, bytes=0)
    catalog.claim("a", content=content(1), limits=tight)
    assert catalog.publish("a", content(1), created=0.0, limits=tight).version == 1
    assert catalog.get("a").version == 1
    # As another name, or after it was deleted, the same content is new.
    for _ in range(2):
        with pytest.raises(AdapterQuotaExceeded):
            catalog.publish("b", content(1), created=0.0, limits=Limits(bytes=2999))
        catalog.publish("b", content(1), created=0.0, limits=Limits(bytes=3000))
        catalog.delete("b", now=0.0)


def test_an_owner_above_a_limit_that_was_lowered_may_do_what_does_not_need_it(
    catalog: Catalog,
) -> None:
    for name in "abc":
        catalog.publish(name, sized(name, 100), created=0.0)
    catalog.publish("a", sized("a2", 100), created=0.0, limits=Limits(adapters=1))
    catalog.publish("d", sized("d", 0), created=0.0, limits=Limits(bytes=1))
    catalog.activate("a", 1)
    catalog.delete("b", now=0.0)
    catalog.check()


def test_what_is_refused_changes_nothing(catalog: Catalog, database: Database) -> None:
    catalog.publish("a", content(1), created=0.0)
    catalog.publish("gone", content(2), created=0.0)
    catalog.delete("gone", now=5.0)
    before = owners(database), catalog.versions("a"), catalog.collectable(9.0)
    for name, limits in (
        ("a", Limits(bytes=1999)),
        ("b", Limits(adapters=1)),
        ("gone", Limits(adapters=1)),
    ):
        with pytest.raises(AdapterQuotaExceeded):
            catalog.publish(name, content(2), created=0.0, limits=limits)
    assert (owners(database), catalog.versions("a"), catalog.collectable(9.0)) == before
    for name in ("b", "gone"):
        with pytest.raises(AdapterNotFound):
            catalog.get(name)
    assert catalog.publish("b", content(3), created=0.0).version == 1
    assert catalog.publish("a", content(3), created=0.0).version == 2, "no number was given out"
    catalog.check()


@pytest.mark.parametrize("seed", range(3))
def test_claims_and_uploads_agree_with_a_sum(
    catalog: Catalog, database: Database, seed: int
) -> None:
    rng = random.Random(seed)
    bases = [catalog, Catalog(database, base_digest=OTHER_BASE, owner="ann")]
    live: dict[str, dict[str, int]] = {}
    for step in range(120):
        base = rng.randrange(2)
        name = f"{'xy'[base]}{rng.randrange(4)}"
        if rng.random() < 0.2:
            if live.pop(name, None) is not None:
                bases[base].delete(name, now=step)
            continue
        new = sized(number := rng.randrange(6), 100 * number)
        limits = Limits(adapters=rng.choice([None, 3, 5]), bytes=rng.choice([None, 1000, 2500]))
        size = sum(sum(versions.values()) for versions in live.values())
        known = new.digest in live.get(name, {})
        room = known or (
            (limits.adapters is None or name in live or len(live) < limits.adapters)
            and (limits.bytes is None or new.bytes == 0 or size + new.bytes <= limits.bytes)
        )
        if room:
            bases[base].claim(name, content=new, limits=limits)
            bases[base].publish(name, new, created=step, limits=limits)
            live.setdefault(name, {})[new.digest] = new.bytes
            size = sum(sum(versions.values()) for versions in live.values())
        else:
            with pytest.raises(AdapterQuotaExceeded):
                bases[base].claim(name, content=new, limits=limits)
            with pytest.raises(AdapterQuotaExceeded):
                bases[base].publish(name, new, created=step, limits=limits)
        assert owners(database) == ({"ann": (len(live), size)} if owners(database) else {})
    catalog.check()


def test_a_claim_without_content_refuses_what_no_content_could_be(catalog: Catalog) -> None:
    catalog.publish("a", sized(1, 100), created=0.0)
    catalog.publish("gone", sized(2, 100), created=0.0)
    catalog.delete("gone", now=0.0)
    for name in ("b", "gone"):
        catalog.claim(name, limits=Limits(adapters=2, bytes=101))
        with pytest.raises(AdapterQuotaExceeded, match="adapters"):
            catalog.claim(name, limits=Limits(adapters=1))
        with pytest.raises(AdapterQuotaExceeded, match="100 are in use, and this needs more"):
            catalog.claim(name, limits=Limits(bytes=100))
    catalog.claim("a", limits=Limits(adapters=0, bytes=0))


@pytest.fixture
def shared(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    yield database
    Catalog(database, base_digest=BASE).check()
    database.close()


@pytest.mark.parametrize("limits", [Limits(adapters=3), Limits(bytes=3500)])
def test_uploads_at_the_same_time_do_not_slip_under_a_limit(
    shared: Database, limits: Limits
) -> None:
    """Of an owner that had nothing, with two bases: not even a row to wait for."""
    threads = 8
    for round_ in range(3):
        barrier = threading.Barrier(threads)

        def upload(number: int, owner: str = f"o{round_}", barrier: object = barrier) -> bool:
            base = (BASE, OTHER_BASE)[number % 2]
            catalog = Catalog(shared, base_digest=base, owner=owner)
            barrier.wait(60.0)  # type: ignore[attr-defined]
            try:
                catalog.publish(f"a{number}", content(number), created=0.0, limits=limits)
            except AdapterQuotaExceeded:
                return False
            return True

        with ThreadPoolExecutor(threads) as pool:
            done = [pool.submit(upload, number) for number in range(threads)]
            assert sum(future.result(60.0) for future in done) == 3
        assert owners(shared)[f"o{round_}"] == (3, 3000)


def test_what_there_is_no_room_for_is_not_stored_either(database: Database, tmp_path: Path) -> None:
    registry = Registry(database, LocalStore(tmp_path / "store"), base_digest=BASE)
    limits = Limits(adapters=1, bytes=100)
    for name, size in (("a", 101), ("b", 100), ("c", 0)):
        new = sized(name, size)
        if name == "b":
            registry.publish(name, new, b"b", owner="ann", limits=limits)
        else:
            with pytest.raises(AdapterQuotaExceeded):
                registry.publish(name, new, b"x", owner="ann", limits=limits)
    files = [path.name for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert files == [content("b").digest]


def test_bulk_import_counts_what_it_brings(database: Database) -> None:
    def adapter(owner: str, name: str, base: str, *sizes: int) -> Adapter:
        versions = tuple(
            Version(number, sized(f"{owner}{name}{base}{number}{size}", size), 0.0, "upload")
            for number, size in enumerate(sizes, start=1)
        )
        return Adapter(owner, name, base, len(sizes), versions)

    batch = [
        adapter("ann", "a", BASE, 10, 20),
        adapter("ann", "b", OTHER_BASE, 5),
        adapter("bob", "a", BASE, 7),
    ]
    publish_many(database, batch)
    assert owners(database) == {"ann": (2, 35), "bob": (1, 7)}
    publish_many(database, batch)
    assert owners(database) == {"ann": (2, 35), "bob": (1, 7)}, "nothing was new"
    catalog = Catalog(database, base_digest=BASE, owner="ann")
    catalog.delete("a", now=0.0)
    again = [adapter("ann", "a", BASE, 1), adapter("ann", "b", OTHER_BASE, 5, 100), *batch[2:]]
    publish_many(database, [*again, adapter("zoe", "z", BASE, 0)])
    assert owners(database) == {"ann": (2, 106), "bob": (1, 7), "zoe": (1, 0)}
    catalog.check()


def test_an_older_database_is_counted_when_it_is_upgraded(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        for module in ("upgrading", "database"):
            patch.setattr(f"shoal.adapters.registry.{module}.SCHEMA_VERSION", 2)
        old = Database(database_url)
    with old.write() as connection:
        for number, owner, base, deleted in (
            (1, "ann", BASE, "NULL"),
            (2, "ann", OTHER_BASE, "NULL"),
            (3, "ann", BASE, "5.0"),
            (4, "", BASE, "NULL"),
        ):
            connection.execute(
                text(
                    "INSERT INTO adapters (id, owner, name, base_digest, active_version, "
                    f"next_version, live_from, deleted_at) VALUES ({number}, '{owner}', "
                    f"'a{number}', '{base}', 2, 4, 2, {deleted})"
                )
            )
            for version in (2, 3) if deleted == "NULL" else ():
                connection.execute(
                    text(
                        "INSERT INTO versions (adapter_id, version, digest, family, format, rank, "
                        f"bytes, packed_elements, base_digest, source, created) VALUES ({number}, "
                        f"{version}, '{content((number, version)).digest}', 'core', 'lora_xs', 8, "
                        f"{10**number * version}, 1, '{base}', 'upload', 0.0)"
                    )
                )
        connection.execute(
            text(
                "INSERT INTO totals (owner, base_digest, names) VALUES "
                f"('ann', '{BASE}', 1), ('ann', '{OTHER_BASE}', 1), ('', '{BASE}', 1)"
            )
        )
    old.close()
    database = Database(database_url)
    assert owners(database) == {"ann": (2, 550), "": (1, 50_000)}
    Catalog(database, base_digest=BASE).check()
    database.close()
