"""A database that says nothing keeps nobody for long, and is found again when it is back."""

import socket
import time
from collections.abc import Iterator

import pytest
from sqlalchemy import make_url, text
from tests.adapters.databases import BASE, PostgresServer, content
from tests.adapters.proxies import Proxy

from shoal.adapters.registry import database as database_module
from shoal.adapters.registry.catalog import Catalog
from shoal.adapters.registry.database import Database
from shoal.adapters.registry.errors import RegistryUnavailable
from shoal.adapters.registry.outages import RETRY_S, SLOW_S, Door, Watchdog


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_while_nobody_is_answered_one_at_a_time_finds_out() -> None:
    clock = Clock()
    door = Door(clock)
    first, second = door.enter(), door.enter()
    clock.now += SLOW_S
    door.failed(first)
    door.failed(second)
    for _ in range(3):
        with pytest.raises(RegistryUnavailable, match="a moment ago"):
            door.enter()
        clock.now += RETRY_S
        door.enter()  # the one who may try
    door.answered()
    for _ in range(3):
        door.enter()


def test_a_quick_failure_shuts_no_door() -> None:
    clock = Clock()
    door = Door(clock)
    entered = door.enter()
    clock.now += SLOW_S / 2
    door.failed(entered)
    door.enter()


def test_a_call_is_ended_when_its_time_is_over_and_not_before() -> None:
    watchdog = Watchdog(poll_s=0.01)
    here, there = socket.socketpair()
    with watchdog.limited(here, 60.0):
        there.sendall(b"x")
        assert here.recv(1) == b"x"
    began = time.monotonic()
    with watchdog.limited(here, 0.2):
        assert here.recv(1) == b"", "shut down"
    assert 0.2 <= time.monotonic() - began < 30
    watchdog.close()
    here.close()
    there.close()


@pytest.fixture
def network(postgres: PostgresServer) -> Iterator[tuple[Proxy, str]]:
    """A network to an empty database, and the database's URL through it."""
    url = make_url(postgres.new_schema())
    with Proxy(f"{url.query['host']}/.s.PGSQL.5432") as proxy:
        query = {key: value for key, value in url.query.items() if key != "host"}
        through = url.set(host="127.0.0.1", port=proxy.port, query=query)
        yield proxy, through.render_as_string(hide_password=False)


def test_a_database_that_stops_answering_fails_calls_in_bounded_time(
    network: tuple[Proxy, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "READ_TIMEOUT_S", 3.0)
    monkeypatch.setattr(database_module, "LONG_TIMEOUT_S", 3.0)
    monkeypatch.setattr(database_module, "CONNECT_TIMEOUT_S", 2)
    proxy, url = network
    database = Database(url)
    catalog = Catalog(database, base_digest=BASE)
    catalog.publish("a", content(1), created=0.0)
    proxy.stalled.set()
    began = time.monotonic()
    with pytest.raises(RegistryUnavailable):
        catalog.get("a")
    assert time.monotonic() - began < 60
    with pytest.raises(RegistryUnavailable, match="a moment ago"):
        catalog.publish("b", content(2), created=0.0)
    proxy.stalled.clear()
    until = time.monotonic() + 60
    while True:
        try:
            assert catalog.get("a").version == 1
            break
        except RegistryUnavailable:
            assert time.monotonic() < until
            time.sleep(0.05)
    assert catalog.publish("b", content(2), created=0.0).version == 1
    database.close()


def test_a_statement_is_ended_when_the_answer_does_not_come(
    network: tuple[Proxy, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "READ_TIMEOUT_S", 3.0)
    monkeypatch.setattr(database_module, "CONNECT_TIMEOUT_S", 2)
    proxy, url = network
    database = Database(url)

    def stop_in_the_middle() -> None:
        with database.read() as connection:
            proxy.stalled.set()
            connection.execute(text("SELECT 1"))

    with pytest.raises(RegistryUnavailable):
        stop_in_the_middle()
    proxy.stalled.clear()
    time.sleep(RETRY_S)
    with database.read() as connection:
        assert connection.execute(text("SELECT 1")).scalar() == 1
    database.close()


def test_one_whose_connections_are_cut_is_back_at_once(network: tuple[Proxy, str]) -> None:
    proxy, url = network
    database = Database(url)
    catalog = Catalog(database, base_digest=BASE)
    catalog.publish("a", content(1), created=0.0)
    proxy.refusing.set()
    time.sleep(0.1)
    for _ in range(3):
        with pytest.raises(RegistryUnavailable):
            catalog.get("a")
    proxy.refusing.clear()
    assert catalog.get("a").version == 1
    database.close()
