"""Who besides its owner sees an adapter. Each function works in the transaction of its caller."""

from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, delete, insert, select

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.registry.names import EVERYBODY, validate_owner
from shoal.adapters.registry.tables import SHARES

# To whom one adapter may be shared; sharing with everybody counts as one.
GRANTEES_MAX = 1000


def grantee_of(whom: str | None) -> str:
    """What stands for ``whom`` in the table, None being everybody, or AdapterRejected."""
    return EVERYBODY if whom is None else validate_owner(whom)


def share(connection: Connection, row: Row[Any], grantee: str) -> None:
    """Let ``grantee`` see the adapter of ``row``, which its caller has locked."""
    grantees = _grantees(connection, row)
    if grantee in grantees:
        return
    if len(grantees) >= GRANTEES_MAX:
        raise AdapterRejected(
            f"adapter {row.name!r}", f"is shared with {GRANTEES_MAX} others, which is the limit"
        )
    connection.execute(insert(SHARES).values(owner=row.owner, name=row.name, grantee=grantee))


def unshare(connection: Connection, row: Row[Any], grantee: str) -> None:
    """Undo ``share``."""
    connection.execute(delete(SHARES).where(*_shares_of(row), SHARES.c.grantee == grantee))


def unshare_with_all(connection: Connection, row: Row[Any]) -> None:
    """Let nobody but its owner see the adapter of ``row``."""
    connection.execute(delete(SHARES).where(*_shares_of(row)))


def grantees(connection: Connection, row: Row[Any]) -> list[str | None]:
    """With whom it is shared, sorted; None, which comes first, is everybody."""
    found = _grantees(connection, row)
    return [None if grantee == EVERYBODY else grantee for grantee in found]


def _grantees(connection: Connection, row: Row[Any]) -> list[str]:
    query = select(SHARES.c.grantee).where(*_shares_of(row)).order_by(SHARES.c.grantee)
    return list(connection.execute(query).scalars())


def _shares_of(row: Row[Any]) -> tuple[ColumnElement[bool], ...]:
    return SHARES.c.owner == row.owner, SHARES.c.name == row.name
