"""The catalog's rules about names and versions, against a tiny model and edge by edge."""

import itertools
import random
from pathlib import Path

import pytest
from sqlalchemy import Engine, event, text
from tests.adapters.databases import BASE, PostgresServer, content

from shoal.adapters.errors import AdapterConflict, AdapterNameInvalid, AdapterNotFound
from shoal.adapters.registry.catalog import AdapterInfo, Catalog
from shoal.adapters.registry.database import Database
from shoal.adapters.registry.errors import RegistryUnavailable


@pytest.fixture
def catalog(database: Database) -> Catalog:
    return Catalog(database, base_digest=BASE)


def names(catalog: Catalog, **query: object) -> list[str]:
    found: list[AdapterInfo] = []
    after = None
    while True:
        page, after = catalog.page(limit=13, after=after, **query)  # type: ignore[arg-type]
        assert len(page) <= 13
        found += page
        if after is None:
            return [info.name for info in found]


class Model:
    """The rules in ten lines: per name the versions given out, those that live, the active one."""

    def __init__(self) -> None:
        self.given: dict[str, int] = {}
        self.live: dict[str, dict[int, str]] = {}
        self.active: dict[str, int] = {}

    def publish(self, name: str, digest: str) -> int:
        live = self.live.setdefault(name, {})
        for version, known in live.items():
            if known == digest:
                self.active[name] = version
                return version
        self.given[name] = version = self.given.get(name, 0) + 1
        live[version] = digest
        self.active[name] = version
        return version


@pytest.mark.parametrize("seed", range(5))
def test_random_walk_agrees_with_the_model(catalog: Catalog, seed: int) -> None:
    rng = random.Random(seed)
    model = Model()
    pool = ["a", "a.b", "a-b", "ab", "b", "b_1", "0"]
    for step in range(100):
        name = rng.choice(pool)
        action = rng.choice(["publish", "publish", "publish", "activate", "delete", "look"])
        if action == "publish":
            what = content(rng.randrange(5))
            info = catalog.publish(name, what, created=step)
            assert info.version == model.publish(name, what.digest)
            assert (info.active, info.digest) == (True, what.digest)
        elif action == "activate":
            version = rng.randrange(8)
            if version in model.live.get(name, {}):
                assert catalog.activate(name, version).active
                model.active[name] = version
            else:
                with pytest.raises(AdapterNotFound):
                    catalog.activate(name, version)
        elif action == "delete":
            if name in model.live:
                catalog.delete(name, now=step)
                del model.live[name]
            else:
                with pytest.raises(AdapterNotFound):
                    catalog.delete(name, now=step)
        prefix = rng.choice(["", "", "a", "a.", "b", "z"])
        assert names(catalog, prefix=prefix) == sorted(
            n for n in model.live if n.startswith(prefix)
        )
        assert catalog.count() == len(model.live)
        if name in model.live:
            found = catalog.versions(name)
            assert {info.version: info.digest for info in found} == model.live[name]
            assert [info.version for info in found if info.active] == [model.active[name]]
            assert catalog.get(name).version == model.active[name]
        else:
            with pytest.raises(AdapterNotFound):
                catalog.get(name)
            with pytest.raises(AdapterNotFound):
                catalog.versions(name)
    catalog.check()


def test_a_version_number_is_never_given_out_twice(catalog: Catalog) -> None:
    catalog.publish("a", content(1), created=0.0)
    catalog.publish("a", content(2), created=0.0)
    catalog.delete("a", now=1.0)
    # Also not to the very content that had one before the name was deleted.
    assert catalog.publish("a", content(1), created=2.0).version == 3
    assert [info.version for info in catalog.versions("a")] == [3]
    for gone in (1, 2):
        with pytest.raises(AdapterNotFound, match=f"'a@{gone}'"):
            catalog.get("a", gone)
        with pytest.raises(AdapterNotFound):
            catalog.activate("a", gone)


def test_same_content_is_the_version_it_already_is(catalog: Catalog) -> None:
    first = catalog.publish("a", content(1), created=10.0)
    catalog.publish("a", content(2), created=20.0)
    assert catalog.publish("a", content(1), created=30.0) == first
    assert catalog.get("a") == first
    # Another name with the same content is another adapter.
    assert catalog.publish("b", content(1), created=30.0).version == 1


def test_paging_hundreds_of_names_skips_and_repeats_none(catalog: Catalog) -> None:
    expected = sorted(f"{p}{n}" for p, n in itertools.product(("a-", "a.", "a_", "zz"), range(60)))
    for name in random.Random(0).sample(expected, len(expected)):
        catalog.publish(name, content(name), created=0.0)
    for name in expected[::4]:
        catalog.publish(name, content(name + " again"), created=0.0)
    assert names(catalog) == expected
    assert names(catalog, prefix="a_2") == [n for n in expected if n.startswith("a_2")]
    page, after = catalog.page(limit=1000)
    assert ([info.name for info in page], after) == (expected, None)
    assert [info.version for info in page] == [2, 1, 1, 1] * 60


def test_a_page_goes_on_after_a_name_that_has_been_deleted(catalog: Catalog) -> None:
    for name in "abcd":
        catalog.publish(name, content(name), created=0.0)
    page, after = catalog.page(limit=2)
    catalog.delete("b", now=0.0)
    assert [info.name for info in page] == ["a", "b"]
    assert [info.name for info in catalog.page(limit=2, after=after)[0]] == ["c", "d"]


@pytest.mark.parametrize(
    "name", ["", "A", "-a", ".a", "_a", "a b", "a/b", "a@1", "ä", "a\n", "a" * 129, "a\x00"]
)
def test_bad_names_are_refused(catalog: Catalog, name: str) -> None:
    with pytest.raises(AdapterNameInvalid, match="1 to 128 characters of a-z"):
        catalog.publish(name, content(1), created=0.0)
    assert catalog.count() == 0


@pytest.mark.parametrize("name", ["a", "0", "a" * 128, "a.b-c_d", "9..", "a--"])
def test_good_names_are_taken(catalog: Catalog, name: str) -> None:
    assert catalog.publish(name, content(1), created=0.0).name == name
    assert names(catalog, prefix=name) == [name]


@pytest.mark.parametrize("prefix", ["%", "A", "a%", "\x00", "\ud800", "_", "{"])
def test_a_prefix_that_no_name_has_finds_nothing(catalog: Catalog, prefix: str) -> None:
    catalog.publish("a", content(1), created=0.0)
    assert catalog.page(limit=5, prefix=prefix) == ([], None)


def test_a_cursor_that_is_no_name_is_refused(catalog: Catalog) -> None:
    with pytest.raises(AdapterNameInvalid):
        catalog.page(limit=5, after="no cursor")
    with pytest.raises(ValueError, match="limit must be at least 1, not 0"):
        catalog.page(limit=0)


@pytest.mark.parametrize("version", [-1, 0, 2, 10**9, 2**63, 2**80])
def test_versions_that_do_not_exist_are_not_found(catalog: Catalog, version: int) -> None:
    catalog.publish("a", content(1), created=0.0)
    with pytest.raises(AdapterNotFound):
        catalog.get("a", version)
    with pytest.raises(AdapterNotFound):
        catalog.activate("a", version)
    assert catalog.get("a").version == 1


def test_another_bases_adapters_are_invisible_but_hold_their_names(database: Database) -> None:
    ours = Catalog(database, base_digest=BASE)
    theirs = Catalog(database, base_digest="c" * 64)
    theirs.publish("a", content(1), created=0.0)
    assert (ours.count(), ours.page(limit=5)) == (0, ([], None))
    for call in (
        lambda: ours.get("a"),
        lambda: ours.get("a", 1),
        lambda: ours.versions("a"),
        lambda: ours.activate("a", 1),
        lambda: ours.delete("a", now=0.0),
    ):
        with pytest.raises(AdapterNotFound):
            call()
    with pytest.raises(AdapterConflict, match="another base"):
        ours.publish("a", content(2), created=0.0)
    assert theirs.get("a").digest == content(1).digest
    theirs.delete("a", now=0.0)
    assert ours.publish("a", content(2), created=0.0).version == 2
    with pytest.raises(AdapterNotFound):
        theirs.get("a")
    ours.check()


def test_owners_do_not_see_each_other(database: Database) -> None:
    one = Catalog(database, base_digest=BASE, owner="one")
    two = Catalog(database, base_digest=BASE, owner="two")
    one.publish("a", content(1), created=0.0)
    with pytest.raises(AdapterNotFound):
        two.get("a")
    assert two.publish("a", content(2), created=0.0).version == 1
    one.delete("a", now=0.0)
    assert two.get("a").digest == content(2).digest


def test_what_ships_never_overrides_a_users_choice(catalog: Catalog) -> None:
    def ship(name: str, seed: int) -> int | None:
        info = catalog.publish_shipped(name, content(seed), created=0.0)
        return None if info is None else info.version

    assert ship("new", 1) == 1
    assert ship("new", 1) is None, "the same again changes nothing"
    assert ship("new", 2) == 2, "a newer one replaces what shipped before"
    assert ship("new", 1) is None, "an old one does not come back"
    catalog.activate("new", 1)
    assert ship("new", 2) is None
    assert ship("new", 5) is None, "a newer one does not undo a roll-back"
    assert catalog.get("new").version == 1

    catalog.publish("new", content(3), created=0.0)
    assert ship("new", 4) is None
    assert catalog.get("new").digest == content(3).digest

    catalog.delete("new", now=0.0)
    assert ship("new", 4) is None
    assert catalog.count() == 0


@pytest.mark.parametrize("data", [b"hello, I am no database\n" * 100, b"\x00" * 8192])
def test_a_file_that_is_no_database_is_refused(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "registry.db"
    file.write_bytes(data)
    with pytest.raises(RegistryUnavailable, match=r"registry\.db"):
        Database(f"sqlite:///{file}")


@pytest.mark.parametrize("url", ["registry.db", "nosuchdialect://x", "sqlite:////proc/no/r.db"])
def test_a_place_that_cannot_hold_a_registry_is_refused(url: str) -> None:
    with pytest.raises(RegistryUnavailable):
        Database(url)


def test_sqlite_is_set_up_to_survive_power_failures(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/deep/er/registry.db")
    with database.read() as connection:
        settings = {
            name: connection.execute(text(f"PRAGMA {name}")).scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    database.close()
    assert settings == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


def test_every_look_up_searches_an_index() -> None:
    database = Database("sqlite://")
    catalog = Catalog(database, base_digest=BASE)
    catalog.publish("a", content(1), created=0.0)
    ran: list[tuple[str, object]] = []

    def capture(_c: object, _cursor: object, statement: str, values: object, *_: object) -> None:
        ran.append((statement, values))

    event.listen(Engine, "before_cursor_execute", capture)
    try:
        catalog.get("a")
        catalog.get("a", 1)
        catalog.page(limit=3, after="0", prefix="a")
        catalog.count()
        catalog.versions("a")
    finally:
        event.remove(Engine, "before_cursor_execute", capture)
    assert len(ran) == 5
    with database.read() as connection:
        for statement, values in ran:
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values).all()  # type: ignore[call-overload]
            steps = [row.detail for row in plan]
            assert all(step.startswith(("SEARCH", "USE TEMP")) for step in steps), steps
            if "LIMIT" in statement:
                assert not [step for step in steps if "TEMP" in step], "a page must not sort"
    database.close()


def test_look_ups_and_pages_use_the_indexes_of_postgresql(postgres: PostgresServer) -> None:
    """With the planner as it is, and a few thousand rows."""
    database = Database(postgres.new_schema())
    catalog = Catalog(database, base_digest=BASE)
    catalog.publish("template", content(0), created=0.0)
    with database.write() as connection:
        for table, columns, values in [
            (
                "adapters",
                "id, owner, name, base_digest, active_version, next_version, live_from",
                "n + 10, '', 'n' || n, base_digest, 1, 2, 1",
            ),
            (
                "versions",
                "adapter_id, version, digest, family, format, rank, bytes, packed_elements, "
                "base_digest, source, created",
                "n + 10, 1, md5(n::text), family, format, rank, bytes, packed_elements, "
                "base_digest, source, created",
            ),
        ]:
            rows = f"SELECT {values} FROM {table}, generate_series(1, 5000) n"
            connection.execute(text(f"INSERT INTO {table} ({columns}) {rows}"))
    with database.write() as connection:
        connection.execute(text("ANALYZE adapters, versions"))
    ran: list[tuple[str, object]] = []

    def capture(_c: object, _cursor: object, statement: str, values: object, *_: object) -> None:
        ran.append((statement, values))

    event.listen(database._engine, "before_cursor_execute", capture)
    assert catalog.get("n4321", 1).name == "n4321"
    assert [info.name for info in catalog.page(limit=2, prefix="n43", after="n4320")[0]] == [
        "n4321",
        "n4322",
    ]
    assert len(catalog.versions("n4321")) == 1
    with pytest.raises(AdapterNotFound):
        Catalog(database, base_digest=BASE, owner="ann").get("bob/n4321")
    event.remove(database._engine, "before_cursor_execute", capture)
    assert len(ran) == 4
    with database.read() as connection:
        for statement, values in ran:
            plan = connection.exec_driver_sql(f"EXPLAIN {statement}", values)  # type: ignore[arg-type]
            steps = "\n".join(plan.scalars())
            assert "Index" in steps
            assert "Seq Scan on adapters" not in steps, steps
            assert "Seq Scan on versions" not in steps, steps
            assert not ("Limit" in steps and "Sort" in steps), "a page must not sort"
    database.close()
