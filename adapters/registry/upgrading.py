"""Brings a database to this release's schema, with Alembic.

One transaction: another process sees the old schema or the new one, and a failure leaves the old.
"""

import threading
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, delete, insert, inspect, select

from shoal.adapters.registry.tables import SCHEMA, SCHEMA_VERSION

# Alembic keeps what it works on in module globals.
_one_at_a_time = threading.Lock()

# Alembic's default name for its table.
_ALEMBIC_TABLE = "alembic_version"


def schema_version(connection: Connection) -> int:
    """The schema that the database has; 0 when it is empty."""
    if not inspect(connection).has_table(SCHEMA.name):
        return 0
    return int(connection.execute(select(SCHEMA.c.version)).scalar_one())


def upgrade(connection: Connection) -> None:
    """Run the migrations that are missing.

    Args:
        connection: in a transaction that keeps other processes out.
    """
    config = Config()
    # The files lie beside this one in a checkout and in an installed package alike.
    folder = str(Path(__file__).parent / "migrations")
    config.set_main_option("script_location", folder.replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    known = schema_version(connection)
    with _one_at_a_time:
        if known and not inspect(connection).has_table(_ALEMBIC_TABLE):
            command.stamp(config, f"{known:04}")
        command.upgrade(config, f"{SCHEMA_VERSION:04}")
    connection.execute(delete(SCHEMA))
    connection.execute(insert(SCHEMA).values(version=SCHEMA_VERSION))
