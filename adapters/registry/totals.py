"""What each owner has, kept up to date so that neither a metric nor a limit has to count it.

Changed at the end of a transaction, first the rows of ``totals`` and then those of ``owners``, each
in order: whoever else changes an owner's adapters waits there. That is also what makes a limit
hold: an owner's row tells what everybody before has taken, and nobody else takes anything before
this transaction has ended.
"""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from sqlalchemy import Connection, insert, select, update

from shoal.adapters.errors import AdapterQuotaExceeded
from shoal.adapters.registry.keys import Limits
from shoal.adapters.registry.tables import OWNERS, TOTALS


class Amount(NamedTuple):
    """Live names, and the bytes of their versions' canonical records."""

    names: int
    bytes: int


def used(connection: Connection, owner: str) -> Amount:
    """What ``owner`` has, of all bases."""
    query = select(OWNERS.c.names, OWNERS.c.bytes).where(OWNERS.c.owner == owner)
    row = connection.execute(query).one_or_none()
    return Amount(0, 0) if row is None else Amount(*row)


def add(
    connection: Connection,
    owner: str,
    base_digest: str,
    more: Amount,
    *,
    limits: Limits | None = None,
) -> None:
    """``owner`` has so much more, or less, of one base.

    Raises:
        AdapterQuotaExceeded: than ``limits`` allow; the transaction is to be undone.
    """
    add_many(connection, {(owner, base_digest): more})
    if limits is not None and (limits.adapters is not None or limits.bytes is not None):
        now = used(connection, owner)
        check_room(Amount(now.names - more.names, now.bytes - more.bytes), more, limits)


def add_many(connection: Connection, more: Mapping[tuple[str, str], Amount]) -> None:
    """Owners have so much more, by owner and base digest."""
    names: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for (owner, base_digest), amount in sorted(more.items()):
        names[owner] += amount.names
        sizes[owner] += amount.bytes
        if amount.names:
            _add_names(connection, owner, base_digest, amount.names)
    for owner, size in sizes.items():  # sorted, as `more` was
        if size or names[owner]:
            _add_to_owner(connection, owner, Amount(names[owner], size))


def check_room(has: Amount, needs: Amount, limits: Limits) -> None:
    """Check that an owner that ``has`` so much may take what it ``needs``.

    What needs nothing of a limit is not held to it, even if there is more than it allows.

    Raises:
        AdapterQuotaExceeded: it may not.
    """
    for limit, allowed, of, more in (
        ("adapters", limits.adapters, has.names, needs.names),
        ("bytes", limits.bytes, has.bytes, needs.bytes),
    ):
        if allowed is not None and more > 0 and of + more > allowed:
            raise AdapterQuotaExceeded(limit, allowed=allowed, used=of, needed=more)


def _add_names(connection: Connection, owner: str, base_digest: str, names: int) -> None:
    this = TOTALS.c.owner == owner, TOTALS.c.base_digest == base_digest
    changed = connection.execute(
        update(TOTALS).where(*this).values(names=TOTALS.c.names + names)
    ).rowcount
    if changed == 0:
        row = {"owner": owner, "base_digest": base_digest, "names": names}
        connection.execute(insert(TOTALS).values(row))


def _add_to_owner(connection: Connection, owner: str, more: Amount) -> None:
    changed = connection.execute(
        update(OWNERS)
        .where(OWNERS.c.owner == owner)
        .values(names=OWNERS.c.names + more.names, bytes=OWNERS.c.bytes + more.bytes)
    ).rowcount
    if changed == 0:
        connection.execute(insert(OWNERS).values(owner=owner, **more._asdict()))
