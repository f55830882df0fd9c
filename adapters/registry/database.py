"""Transactions on the catalog's database, whichever SQLAlchemy URL it has.

Owns the connection settings (for SQLite: WAL, an fsync per commit, foreign keys, one writer at a
time), retries, and when the schema is upgraded. Knows nothing of adapters.
"""

import contextlib
import os
import random
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    InvalidatePoolError,
    TimeoutError,
)
from sqlalchemy.pool import QueuePool

from shoal.adapters.registry.errors import RegistryUnavailable, SchemaTooNew
from shoal.adapters.registry.outages import Door, Watchdog
from shoal.adapters.registry.tables import SCHEMA_VERSION
from shoal.adapters.registry.upgrading import schema_version, upgrade

# How long a statement waits for another process's write, and a thread for a connection.
BUSY_TIMEOUT_S = 20.0
# PostgreSQL only: how long to wait for a new connection, and how long the server may take for any
# one statement.
CONNECT_TIMEOUT_S = 5
STATEMENT_TIMEOUT_S = 120.0
# … and how long this side waits, should the server say nothing at all: for what requests read, and
# for changes and what a command reads.
READ_TIMEOUT_S = 5.0
LONG_TIMEOUT_S = STATEMENT_TIMEOUT_S + 10.0
CONNECTIONS_MAX = 8
# How often a transaction is tried that others' transactions got in the way of.
ATTEMPTS_MAX = 8

# Any number that nobody else in the same PostgreSQL database locks.
_UPGRADE_LOCK = 0x73686F616C
# serialization_failure, deadlock_detected, unique_violation (two created the same row at once)
_IN_THE_WAY = ("40001", "40P01", "23505")

# Where a pooled connection keeps its socket for the watchdog.
_SOCKET = "shoal socket"

T = TypeVar("T")


def sqlite_file(url: str) -> Path | None:
    """The file behind a SQLite URL; None for an in-memory one or another database.

    Raises:
        RegistryUnavailable: not a URL.
    """
    parsed = _parse(url)
    name = parsed.database or ""
    if parsed.query.get("uri") == "true" and name.startswith("file:"):
        memory = parsed.query.get("mode") == "memory"
        name = "" if memory else name.removeprefix("file:")
    if parsed.get_backend_name() != "sqlite" or name in ("", ":memory:"):
        return None
    return Path(name)


def _parse(url: str) -> URL:
    try:
        return make_url(url)
    except (ArgumentError, ValueError) as error:
        raise _bad_url(error) from error


def _bad_url(error: Exception) -> RegistryUnavailable:
    return RegistryUnavailable(
        f"--registry needs a SQLAlchemy URL such as sqlite:////data/registry.db, or "
        "postgresql+psycopg://user@host/name with the package's extra `postgres` installed: "
        f"{error}"
    )


class Database:
    """Read and write transactions; thread-safe.

    A lost connection fails the call that was using it; the next one gets a new connection.

    Args:
        url: a SQLAlchemy URL: SQLite, or ``postgresql+psycopg://``. A SQLite file and its folder
            are made when absent. ``sqlite://`` is in memory, on the one connection that all
            threads share in turn.

    Raises:
        RegistryUnavailable: cannot be opened, or is not a database.
        SchemaTooNew: written by a newer release; nothing was changed.
    """

    def __init__(self, url: str) -> None:
        parsed = _parse(url)
        self._is_sqlite = parsed.get_backend_name() == "sqlite"
        file = sqlite_file(url)
        in_memory = self._is_sqlite and file is None
        try:
            self._engine = create_engine(
                parsed,
                poolclass=QueuePool,
                pool_size=1 if in_memory else CONNECTIONS_MAX,
                max_overflow=0,
                pool_timeout=BUSY_TIMEOUT_S,
                connect_args=_connect_arguments(parsed),
            )
        except (ArgumentError, ImportError) as error:
            # Also a database of which the driver is not installed.
            raise _bad_url(error) from error
        self._shown_url = parsed.render_as_string(hide_password=True)
        if file is not None:
            _make_folder(file.parent)
        self._writer = self._reader = self._engine
        # Threads queue here rather than in SQLite, which only polls its lock.
        self._writing = threading.Lock() if self._is_sqlite else contextlib.nullcontext()
        self._watchdog = Watchdog()
        self._door = Door()
        if self._is_sqlite:
            self._writer = self._engine.execution_options(shoal_write=True)
            _configure_sqlite(self._engine)
        else:
            _watch(self._engine, self._watchdog)
            # One round trip a look-up instead of three.
            self._reader = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        try:
            self._ensure_schema()
        except BaseException:
            self.close()
            raise

    @property
    def backend(self) -> str:
        """Which database it is: ``sqlite``, ``postgresql``."""
        return self._engine.dialect.name

    @contextlib.contextmanager
    def read(self, *, limit_s: float | None = None) -> Iterator[Connection]:
        """A connection to read with; each statement by itself sees a consistent state.

        Args:
            limit_s: PostgreSQL only: how long it may take before it is taken for dead, instead of
                ``READ_TIMEOUT_S``.
        """
        limit_s = READ_TIMEOUT_S if limit_s is None else limit_s
        with self._translated(), self._connected(self._reader, limit_s) as connection:
            yield connection

    @contextlib.contextmanager
    def write(self, *, limit_s: float = LONG_TIMEOUT_S) -> Iterator[Connection]:
        """All or nothing: durable when the block has ended, undone when it raises.

        Args:
            limit_s: PostgreSQL only: how long it may take before it is taken for dead.
        """
        with (
            self._translated(),
            self._writing,
            self._connected(self._writer, limit_s) as connection,
        ):
            yield connection

    def transact(self, work: Callable[[Connection], T]) -> T:
        """``work`` in one write transaction; from the start again when another got in its way.

        Rows that ``work`` read without locking them may be changed by others meanwhile.

        Raises:
            RegistryUnavailable: also when others got in its way ``ATTEMPTS_MAX`` times. Nothing
                has changed, unless the connection was lost while committing: then nobody knows.
            IntegrityError: it broke a constraint, every time it was tried.
        """
        with self._translated():
            for attempt in range(1, ATTEMPTS_MAX + 1):
                try:
                    with (
                        self._writing,
                        self._connected(self._writer, LONG_TIMEOUT_S) as connection,
                    ):
                        return work(connection)
                except DBAPIError as error:
                    state = getattr(error.orig, "sqlstate", None)
                    if state not in _IN_THE_WAY or attempt == ATTEMPTS_MAX:
                        raise
                time.sleep(random.uniform(0.0, 0.002 * 2**attempt))
        raise AssertionError("not reached")

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Let another process write meanwhile: nobody of this one tries to."""
        with self._writing:
            yield

    def close(self) -> None:
        """Close the connections; an in-memory database is gone after it."""
        self._engine.dispose()
        self._watchdog.close()

    @contextlib.contextmanager
    def _connected(self, engine: Engine, limit_s: float) -> Iterator[Connection]:
        """A connection in a transaction, which ends before ``limit_s`` is over or fails."""
        with engine.connect() as connection, contextlib.ExitStack() as stack:
            self._door.answered()
            watched = connection.connection.info.get(_SOCKET)
            if watched is not None:
                stack.enter_context(self._watchdog.limited(watched, limit_s))
            stack.enter_context(connection.begin())
            yield connection

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        entered = self._door.enter()
        try:
            yield
        except IntegrityError:
            raise
        except (DBAPIError, TimeoutError, sqlite3.Error) as error:
            said = error.orig if isinstance(error, DBAPIError) else error
            # What the server itself says has a code: a lock or a statement that took too long.
            if not self._is_sqlite and getattr(said, "sqlstate", None) is None:
                self._door.failed(entered)
            raise RegistryUnavailable(f"registry {self._shown_url}: {said}") from error

    def _ensure_schema(self) -> None:
        with self.read() as connection:
            if self._schema_is_current(connection):
                return
        with self.write(limit_s=float("inf")) as connection:
            if not self._is_sqlite:
                # Whoever comes second waits for as long as the first one needs.
                connection.execute(text("SET LOCAL lock_timeout = 0"))
                connection.execute(text("SET LOCAL statement_timeout = 0"))
                connection.execute(text(f"SELECT pg_advisory_xact_lock({_UPGRADE_LOCK})"))
            if not self._schema_is_current(connection):
                upgrade(connection)

    def _schema_is_current(self, connection: Connection) -> bool:
        version = schema_version(connection)
        if version > SCHEMA_VERSION:
            raise SchemaTooNew(
                f"registry {self._shown_url} has schema version {version}; this release of shoal "
                f"reads up to {SCHEMA_VERSION}: upgrade shoal, or open another registry"
            )
        return version == SCHEMA_VERSION


def _connect_arguments(url: URL) -> dict[str, Any]:
    """What the driver is told besides the URL."""
    if url.get_backend_name() == "sqlite":
        return {"check_same_thread": False}
    if url.get_backend_name() != "postgresql":
        return {}
    milliseconds = int(BUSY_TIMEOUT_S * 1000)
    options = [
        str(url.query.get("options", "")),
        f"-c lock_timeout={milliseconds}",
        f"-c statement_timeout={int(STATEMENT_TIMEOUT_S * 1000)}",
    ]
    return {
        "connect_timeout": CONNECT_TIMEOUT_S,
        # A peer that vanished without a word is noticed, not waited for.
        "tcp_user_timeout": milliseconds,
        "options": " ".join(options).strip(),
    }


def _watch(engine: Engine, watchdog: Watchdog) -> None:
    """Let ``watchdog`` reach every connection, and test them as they leave the pool."""

    @event.listens_for(engine, "connect")
    def _connected(connection: Any, record: Any) -> None:
        # A number of its own for the same socket: the driver's may be another's when it is needed.
        record.info[_SOCKET] = socket.socket(fileno=os.dup(connection.fileno()))

    @event.listens_for(engine, "close")
    def _closed(_connection: Any, record: Any) -> None:
        watched = record.info.pop(_SOCKET, None)
        if watched is not None:
            watched.close()

    # In place of the pool's own ping, which nothing would end.
    @event.listens_for(engine, "checkout")
    def _leaving(connection: Any, record: Any, _proxy: Any) -> None:
        try:
            with watchdog.limited(record.info[_SOCKET], READ_TIMEOUT_S):
                engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error as error:
            raise InvalidatePoolError from error


def _configure_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def _connected(connection: sqlite3.Connection, _record: Any) -> None:
        # The driver must not open transactions by itself; `_begun` does.
        connection.isolation_level = None
        # First of all, so that the switch to WAL waits for other processes too.
        connection.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}")
        connection.execute("PRAGMA journal_mode = WAL")
        # NORMAL would lose the last commits in a power failure.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        # A writer takes the lock at once: a reader that turns into a writer half-way can only
        # fail with SQLITE_BUSY, however long it would be willing to wait. Readers need no
        # transaction: each statement is one.
        if connection.get_execution_options().get("shoal_write", False):
            connection.exec_driver_sql("BEGIN IMMEDIATE")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RegistryUnavailable(f"registry folder {os.fspath(folder)!r}: {error}") from error
