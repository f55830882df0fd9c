"""Databases of every age end up with this release's schema, or are left alone."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import select, update
from tests.adapters.databases import BASE, content

from shoal.adapters.errors import AdapterNotFound
from shoal.adapters.registry.catalog import Catalog
from shoal.adapters.registry.database import Database
from shoal.adapters.registry.errors import RegistryUnavailable, SchemaTooNew
from shoal.adapters.registry.tables import GARBAGE, METADATA, SCHEMA, SCHEMA_VERSION

# What the release before migrations made, word for word.
SCHEMA_1 = """
CREATE TABLE shoal_schema (version INTEGER NOT NULL, PRIMARY KEY (version));
CREATE TABLE adapters (
    id INTEGER NOT NULL, owner VARCHAR(128) NOT NULL, name VARCHAR(128) NOT NULL,
    base_digest VARCHAR(64) NOT NULL, active_version INTEGER NOT NULL,
    next_version INTEGER NOT NULL, live_from INTEGER NOT NULL, deleted_at DOUBLE,
    PRIMARY KEY (id), CONSTRAINT adapters_owner_name UNIQUE (owner, name)
);
CREATE INDEX adapters_live ON adapters (owner, base_digest, name) WHERE deleted_at IS NULL;
CREATE TABLE totals (
    owner VARCHAR(128) NOT NULL, base_digest VARCHAR(64) NOT NULL, names INTEGER NOT NULL,
    PRIMARY KEY (owner, base_digest)
);
CREATE TABLE versions (
    adapter_id INTEGER NOT NULL, version INTEGER NOT NULL, digest VARCHAR(64) NOT NULL,
    family VARCHAR(16) NOT NULL, format VARCHAR(32) NOT NULL, rank INTEGER NOT NULL,
    bytes BIGINT NOT NULL, packed_elements BIGINT NOT NULL, basis_id VARCHAR(64),
    base_digest VARCHAR(64) NOT NULL, source VARCHAR(16) NOT NULL, created DOUBLE NOT NULL,
    PRIMARY KEY (adapter_id, version), FOREIGN KEY(adapter_id) REFERENCES adapters (id)
);
CREATE INDEX versions_digest ON versions (adapter_id, digest);
INSERT INTO shoal_schema VALUES (1);
"""


def old_database(file: Path) -> None:
    """``kept``: two versions, rolled back. ``gone``: deleted. ``back``: deleted, then version 2."""
    connection = sqlite3.connect(file)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(SCHEMA_1)
    connection.executemany(
        "INSERT INTO adapters VALUES (?, '', ?, ?, ?, ?, ?, ?)",
        [
            (1, "kept", BASE, 1, 3, 1, None),
            (2, "gone", BASE, 1, 2, 1, 50.0),
            (3, "back", BASE, 2, 3, 2, None),
        ],
    )
    connection.executemany(
        "INSERT INTO versions VALUES (?, ?, ?, 'core', 'lora_xs', 8, 1000, 13440, ?, ?, ?, 5.0)",
        [
            (adapter, version, content(seed).digest, "f" * 64, BASE, "upload")
            for adapter, version, seed in [(1, 1, 1), (1, 2, 2), (2, 1, 2), (3, 1, 3), (3, 2, 4)]
        ],
    )
    connection.execute("INSERT INTO totals VALUES ('', ?, 2)", (BASE,))
    connection.commit()
    connection.close()


def test_a_database_from_before_migrations_keeps_everything(tmp_path: Path) -> None:
    old_database(tmp_path / "old.db")
    for _ in range(2):  # the second opening finds nothing to do
        database = Database(f"sqlite:///{tmp_path}/old.db")
        catalog = Catalog(database, base_digest=BASE)
        catalog.check()
        page, _ = catalog.page(limit=9)
        assert [(info.name, info.version) for info in page] == [("back", 2), ("kept", 1)]
        assert [(info.version, info.digest) for info in catalog.versions("kept")] == [
            (1, content(1).digest),
            (2, content(2).digest),
        ]
        kept = catalog.get("kept")
        assert (kept.created, kept.tags, kept.used, kept.owner) == (5.0, {}, None, "")
        assert catalog.count() == 2
        for gone in (("gone", None), ("gone", 1), ("back", 1)):
            with pytest.raises(AdapterNotFound):
                catalog.get(*gone)
        database.close()
    database = Database(f"sqlite:///{tmp_path}/old.db")
    catalog = Catalog(database, base_digest=BASE)
    assert catalog.publish("gone", content(2), created=6.0).version == 2
    assert catalog.publish("back", content(3), created=6.0).version == 3
    database.close()


def test_what_was_deleted_before_is_collectable_unless_something_has_it(tmp_path: Path) -> None:
    old_database(tmp_path / "old.db")
    database = Database(f"sqlite:///{tmp_path}/old.db")
    catalog = Catalog(database, base_digest=BASE)
    assert catalog.collectable(older_than=1e12) == [content(3).digest]
    with database.read() as connection:
        assert min(connection.execute(select(GARBAGE.c.since)).scalars()) > 1.7e9, "grace from now"
    database.close()


def test_migrations_make_the_tables_that_the_code_expects(database: Database) -> None:
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, METADATA) == []
        assert connection.execute(select(SCHEMA.c.version)).scalars().all() == [SCHEMA_VERSION]


def test_a_failed_upgrade_leaves_the_old_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_database(tmp_path / "old.db")
    url = f"sqlite:///{tmp_path}/old.db"
    with monkeypatch.context() as patch:
        patch.setattr("alembic.op.drop_index", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Database(url)
    connection = sqlite3.connect(tmp_path / "old.db")
    tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
    connection.close()
    assert "shares" not in tables
    assert "alembic_version" not in tables
    Database(url).close()


def test_a_newer_schema_is_refused_and_left_alone(database_url: str, tmp_path: Path) -> None:
    database = Database(database_url)
    with database.write() as connection:
        connection.execute(update(SCHEMA).values(version=SCHEMA_VERSION + 1))
    database.close()
    file = tmp_path / "registry.db"
    before = file.read_bytes() if file.exists() else b""
    with pytest.raises(SchemaTooNew, match=f"schema version {SCHEMA_VERSION + 1}.*upgrade shoal"):
        Database(database_url)
    assert (file.read_bytes() if file.exists() else b"") == before


OPEN = """
import sys
from shoal.adapters.registry.database import Database
from shoal.adapters.registry import upgrading
from alembic import command
print("ready", flush=True)
sys.stdin.readline()
Database(sys.argv[1]).close()
"""


def open_at_once(url: str, processes: int = 3) -> None:
    openers = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(processes)
    ]
    for opener in openers:
        assert opener.stdout is not None
        assert opener.stdout.readline() == "ready\n"
    for opener in openers:
        assert opener.stdin is not None
        opener.stdin.write("go\n")
        opener.stdin.flush()
    said = [opener.communicate(timeout=60)[1] for opener in openers]
    assert [opener.returncode for opener in openers] == [0] * processes, said


def test_processes_that_create_a_registry_at_the_same_time_do_it_once(database_url: str) -> None:
    open_at_once(database_url)
    database = Database(database_url)
    Catalog(database, base_digest=BASE).check()
    database.close()


def test_processes_that_upgrade_a_registry_at_the_same_time_do_it_once(tmp_path: Path) -> None:
    old_database(tmp_path / "old.db")
    open_at_once(f"sqlite:///{tmp_path}/old.db")
    database = Database(f"sqlite:///{tmp_path}/old.db")
    catalog = Catalog(database, base_digest=BASE)
    catalog.check()
    assert catalog.count() == 2
    database.close()


def test_a_database_that_cannot_be_reached_is_typed(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(RegistryUnavailable, match="connection"):
        Database(f"postgresql+psycopg://nobody:secret@/none?host={tmp_path}")
    with pytest.raises(RegistryUnavailable) as caught:
        Database(f"postgresql+psycopg://nobody:secret@/none?host={tmp_path}")
    assert "secret" not in str(caught.value)
