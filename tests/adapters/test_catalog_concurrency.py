"""Many threads and processes on one catalog, and a database that goes away."""

import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.exc import OperationalError
from tests.adapters.databases import BASE, PostgresServer, content

from shoal.adapters.errors import AdapterNotFound
from shoal.adapters.registry.catalog import Catalog
from shoal.adapters.registry.database import ATTEMPTS_MAX, Database
from shoal.adapters.registry.errors import RegistryUnavailable
from shoal.adapters.registry.tables import ADAPTERS

THREADS = 8


@pytest.fixture
def shared(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    yield database
    Catalog(database, base_digest=BASE).check()
    database.close()


def at_once(*works: object) -> list[object]:
    barrier = threading.Barrier(len(works))

    def run(work: object) -> object:
        barrier.wait()
        return work()  # type: ignore[operator]

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result(60.0) for future in [pool.submit(run, work) for work in works]]


def test_threads_that_create_one_name_get_consecutive_versions(shared: Database) -> None:
    for round_ in range(4):
        catalog = Catalog(shared, base_digest=BASE, owner=f"owner{round_}")
        infos = at_once(
            *(
                lambda c=catalog, n=n: c.publish("a", content(n), created=0.0).version
                for n in range(THREADS)
            )
        )
        assert sorted(infos) == list(range(1, THREADS + 1))  # type: ignore[type-var]
        assert catalog.count() == 1


def test_threads_that_create_one_content_get_one_version(shared: Database) -> None:
    catalog = Catalog(shared, base_digest=BASE)
    one = content(1)
    works = [lambda: catalog.publish("a", one, created=0.0).version] * THREADS
    assert set(at_once(*works)) == {1}


def test_threads_that_do_everything_to_the_same_names_leave_it_consistent(
    shared: Database,
) -> None:
    """Names, contents, totals, shares and garbage are shared, so that every lock is fought for."""

    def change(seed: int) -> int:
        rng = random.Random(seed)
        catalog = Catalog(shared, base_digest=BASE, owner="ann")
        published = 0
        for step in range(30):
            name = rng.choice("abc")
            try:
                action = rng.choice(["publish", "publish", "activate", "share", "delete", "spare"])
                if action == "publish":
                    info = catalog.publish(name, content(rng.randrange(4)), created=step)
                    assert info.active
                    published += 1
                elif action == "activate":
                    assert catalog.activate(name, rng.randrange(1, 9)).active
                elif action == "share":
                    rng.choice([catalog.share, catalog.unshare])(name, rng.choice([None, "bob"]))
                elif action == "spare":
                    catalog.spare(content(rng.randrange(4)).digest, now=step)
                    digests = [content(n).digest for n in range(4)]
                    catalog.forget(digests, older_than=5.0, remove_bytes=lambda _: None)
                else:
                    catalog.delete(name, now=step)
            except AdapterNotFound:
                pass
        return published

    works = [lambda seed=seed: change(seed) for seed in range(THREADS)]
    assert min(at_once(*works)) > 0  # type: ignore[type-var]


WRITER = """
import random, sys
from shoal.adapters.errors import AdapterNotFound
from shoal.adapters.registry.catalog import Catalog
from shoal.adapters.registry.database import Database
from tests.adapters.databases import BASE, content

seed = int(sys.argv[2])
rng = random.Random(seed)
catalog = Catalog(Database(sys.argv[1]), base_digest=BASE)
print("ready", flush=True)
sys.stdin.readline()
for step in range(40):
    name = rng.choice(["a", "b", f"own{seed}"])
    try:
        if rng.random() < 0.7:
            version = catalog.publish(name, content((seed, step)), created=0.0).version
            print(name, version, content((seed, step)).digest, flush=True)
        else:
            catalog.delete(name, now=0.0)
    except AdapterNotFound:
        pass
"""


def test_processes_never_get_the_same_version_number(database_url: str, shared: Database) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, database_url, str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(3)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    lines = [writer.communicate("go\n", timeout=100)[0].splitlines() for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 3
    given = [tuple(line.split()) for part in lines for line in part]
    numbers = [(name, int(version)) for name, version, _ in given]
    assert len(set(numbers)) == len(numbers) > 60
    for name in ("a", "b"):
        last = max(version for n, version in numbers if n == name)
        assert {v for n, v in numbers if n == name} == set(range(1, last + 1))


READER = """
import sys, time
from shoal.adapters.errors import AdapterNotFound
from shoal.adapters.registry.catalog import Catalog
from shoal.adapters.registry.database import Database
from tests.adapters.databases import BASE

catalog = Catalog(Database(sys.argv[1]), base_digest=BASE)
print("ready", flush=True)
wanted = 1
while wanted <= 20:
    try:
        if catalog.get("a").version >= wanted:
            print(wanted, flush=True)
            wanted += 1
    except AdapterNotFound:
        pass
"""


def test_another_process_sees_an_upload_within_a_second(
    database_url: str, shared: Database
) -> None:
    catalog = Catalog(shared, base_digest=BASE)
    command = [sys.executable, "-c", READER, database_url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
        for number in range(1, 21):
            catalog.publish("a", content(number), created=0.0)
            start = time.monotonic()
            assert reader.stdout.readline() == f"{number}\n"
            assert time.monotonic() - start < 1.0
    assert reader.returncode == 0


def test_a_clock_that_goes_backwards_changes_nothing(database: Database) -> None:
    catalog = Catalog(database, base_digest=BASE)
    for number, now in enumerate([9.0, 5.0, 0.0, -3.0], start=1):
        info = catalog.publish("a", content(number), created=now)
        assert (info.version, info.active, info.created) == (number, True, now)
    catalog.delete("a", now=-10.0)
    with pytest.raises(AdapterNotFound):
        catalog.get("a")
    assert catalog.publish("a", content(1), created=-11.0).version == 5
    assert catalog.get("a").version == 5
    catalog.check()


def test_a_deadlock_is_tried_again_and_not_for_ever(postgres: PostgresServer) -> None:
    database = Database(postgres.new_schema())
    catalog = Catalog(database, base_digest=BASE)
    for name in "ab":
        catalog.publish(name, content(name), created=0.0)
    barrier = threading.Barrier(2)
    tries = []

    def lock_both(first: str, second: str) -> None:
        def work(connection: object) -> None:
            tries.append(first)
            for name in (first, second):
                statement = update(ADAPTERS).where(ADAPTERS.c.name == name)
                connection.execute(statement.values(used=1.0))  # type: ignore[attr-defined]
                if len(tries) <= 2 and name == first:
                    barrier.wait(20.0)

        database.transact(work)

    at_once(lambda: lock_both("a", "b"), lambda: lock_both("b", "a"))
    assert len(tries) == 3

    failed = 0

    def always(connection: object) -> None:
        nonlocal failed
        failed += 1
        connection.execute(  # type: ignore[attr-defined]
            text("DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '40001'; END $$")
        )

    with pytest.raises(RegistryUnavailable):
        database.transact(always)
    assert failed == ATTEMPTS_MAX
    database.close()


def test_a_lost_connection_is_typed_and_the_next_call_works(postgres: PostgresServer) -> None:
    name, url = postgres.new_database()
    database = Database(url)
    catalog = Catalog(database, base_digest=BASE)
    catalog.publish("a", content(1), created=0.0)
    drop = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"

    def lose_it(connection: object) -> None:
        connection.execute(update(ADAPTERS).values(used=1.0))  # type: ignore[attr-defined]
        postgres.run(drop)
        connection.execute(select(ADAPTERS))  # type: ignore[attr-defined]

    with pytest.raises(RegistryUnavailable) as caught:
        database.transact(lose_it)
    assert isinstance(caught.value.__cause__, OperationalError)
    info = catalog.get("a")
    assert (info.version, info.used) == (1, None), "nothing was changed, and it works again"

    postgres.run(drop)
    assert catalog.get("a") == info, "whoever was not using it does not notice"

    postgres.run(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    postgres.run(drop)
    for call in (
        lambda: catalog.get("a"),
        lambda: catalog.page(limit=1),
        lambda: catalog.publish("b", content(2), created=0.0),
        lambda: catalog.delete("a", now=0.0),
        lambda: Database(url),
    ):
        with pytest.raises(RegistryUnavailable):
            call()
    postgres.run(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    assert catalog.publish("b", content(2), created=0.0).version == 1
    assert catalog.count() == 2
    database.close()


def test_a_row_locked_by_somebody_who_hangs_is_typed(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.adapters.registry.database.BUSY_TIMEOUT_S", 0.2)
    url = postgres.new_schema()
    one, two = Database(url), Database(url)
    Catalog(one, base_digest=BASE).publish("a", content(1), created=0.0)
    with one.write() as connection:
        connection.execute(update(ADAPTERS).values(used=1.0))
        with pytest.raises(RegistryUnavailable, match="lock timeout"):
            Catalog(two, base_digest=BASE).publish("a", content(2), created=0.0)
        assert Catalog(two, base_digest=BASE).get("a").version == 1, "readers do not wait"
    assert Catalog(two, base_digest=BASE).publish("a", content(2), created=0.0).version == 2
    one.close()
    two.close()


@pytest.mark.parametrize(
    ("breaking", "mending", "said"),
    [
        ("PRAGMA max_page_count = 1", "PRAGMA max_page_count = 1000000", "full"),
        ("PRAGMA query_only = ON", "PRAGMA query_only = OFF", "readonly"),
    ],
)
def test_a_full_or_read_only_disk_is_typed_and_reading_goes_on(
    breaking: str, mending: str, said: str
) -> None:
    database = Database("sqlite://")  # one connection, which the pragmas are for
    catalog = Catalog(database, base_digest=BASE)
    catalog.publish("a", content(1), created=0.0)
    with database.read() as connection:
        connection.execute(text(breaking))

    def publish_many() -> None:
        for number in range(1000):
            catalog.publish(f"b{number:0100}", content(number), created=0.0)

    with pytest.raises(RegistryUnavailable, match=said):
        publish_many()
    before = catalog.count()
    assert catalog.get("a").version == 1
    assert len(catalog.page(limit=1000)[0]) == before
    with database.read() as connection:
        connection.execute(text(mending))
    catalog.publish("z", content(2), created=0.0)
    assert catalog.count() == before + 1
    catalog.check()
    database.close()
