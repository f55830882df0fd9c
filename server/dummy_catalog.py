"""A catalog full of names without bytes, in seconds: what look-ups cost without an import first.

One statement a table, past the catalog's rules, so in an empty database only.
"""

from sqlalchemy import Connection, text

from shoal.adapters.registry.catalog import Catalog
from shoal.adapters.registry.database import Database

BASE = "b" * 64
OWNER, READER = "ann", "bob"
# One in so many is shared with READER.
SHARED = 10
# Coprime to the number of rows: names do not come in the order of ids.
_STRIDE = 7_919_317


def fill(database: Database, rows: int) -> None:
    """``OWNER`` gets ``rows`` adapters for ``BASE``, each with one version.

    Raises:
        ValueError: the database has adapters already.
        RegistryUnavailable.
    """
    with database.write() as connection:
        if connection.execute(text("SELECT 1 FROM adapters LIMIT 1")).first() is not None:
            raise ValueError("the registry has adapters already: --fill needs an empty one")
        _insert(connection, rows)
    with database.write() as connection:
        connection.execute(text("ANALYZE"))


def is_filled(database: Database) -> bool:
    """Whether ``fill`` made it."""
    return Catalog(database, base_digest=BASE, owner=OWNER).count() > 0


def _insert(connection: Connection, rows: int) -> None:
    number = f"n * {_STRIDE} % {rows}"
    sqlite = connection.dialect.name == "sqlite"
    if sqlite:
        counted = f"SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < {rows}"
        series = f"(WITH RECURSIVE s(n) AS ({counted}) SELECT n FROM s)"
        digest, name = "lower(hex(randomblob(32)))", f"printf('user-%09d', {number})"
    else:
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        series = f"generate_series(1::bigint, {rows}) AS s(n)"
        digest = "encode(sha256(n::text::bytea), 'hex')"
        name = f"'user-' || lpad(({number})::text, 9, '0')"
    for statement in (
        "INSERT INTO adapters (id, owner, name, base_digest, active_version, next_version, "
        f"live_from) SELECT n, '{OWNER}', {name}, '{BASE}', 1, 2, 1 FROM {series}",
        "INSERT INTO versions (adapter_id, version, digest, family, format, rank, bytes, "
        f"packed_elements, base_digest, source, created) SELECT n, 1, {digest}, 'core', "
        f"'lora_xs', 4, 7000, 3360, '{BASE}', 'upload', 0.0 FROM {series}",
        f"INSERT INTO shares (owner, name, grantee) SELECT '{OWNER}', {name}, '{READER}' "
        f"FROM {series} WHERE n % {SHARED} = 0",
        f"INSERT INTO totals (owner, base_digest, names) VALUES ('{OWNER}', '{BASE}', {rows})",
        f"INSERT INTO owners (owner, names, bytes) VALUES ('{OWNER}', {rows}, {7000 * rows})",
    ):
        connection.execute(text(statement))
    if not sqlite:
        # What inserting by hand must do for Catalog.publish, which takes ids from the sequence.
        connection.execute(text(f"SELECT setval('adapters_id_seq', {rows})"))
