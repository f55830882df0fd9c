"""Which stored bytes nobody refers to any more, and since when.

A digest becomes garbage when a version that has it is deleted, and is collectable when that was a
grace period ago and no version has it. Whoever uploads calls ``spare`` first, which starts the
grace period again. So bytes are safe from before they are written until their name exists, as
long as an upload takes less than the grace period, which also has to cover how far hosts' clocks
differ and how long a request may run.
"""

from collections.abc import Callable

from sqlalchemy import Connection, Double, Insert, delete, exists, literal, select, update
from sqlalchemy.dialects import postgresql, sqlite

from shoal.adapters.registry.tables import GARBAGE, VERSIONS

_IS_REFERRED_TO = exists().where(VERSIONS.c.digest == GARBAGE.c.digest)


def bury(connection: Connection, adapter_id: int, now: float) -> None:
    """Delete all versions of an adapter; their digests become garbage of ``now``.

    Also digests that other adapters still have: two of those may be deleted at the same time.
    """
    digests = (
        select(VERSIONS.c.digest, literal(now, Double))
        .where(VERSIONS.c.adapter_id == adapter_id)
        .distinct()
        .order_by(VERSIONS.c.digest)  # the order in which everybody locks
    )
    connection.execute(_insert_or_refresh(connection, digests))
    connection.execute(delete(VERSIONS).where(VERSIONS.c.adapter_id == adapter_id))


def spare(connection: Connection, digest: str, now: float) -> None:
    """Start the grace period of ``digest`` again, if it has one.

    Waits while the bytes are being removed.
    """
    connection.execute(
        update(GARBAGE).where(GARBAGE.c.digest == digest, GARBAGE.c.since < now).values(since=now)
    )


def revive(connection: Connection, digest: str) -> None:
    """A version has ``digest`` again. Waits while the bytes are being removed."""
    connection.execute(delete(GARBAGE).where(GARBAGE.c.digest == digest))


def collectable(connection: Connection, older_than: float, limit: int) -> list[str]:
    """Digests that have been garbage since before ``older_than``, oldest first."""
    query = (
        select(GARBAGE.c.digest)
        .where(GARBAGE.c.since < older_than, ~_IS_REFERRED_TO)
        .order_by(GARBAGE.c.since, GARBAGE.c.digest)
        .limit(limit)
    )
    return list(connection.execute(query).scalars())


def remove(
    connection: Connection, digest: str, older_than: float, remove_bytes: Callable[[str], None]
) -> bool:
    """Forget ``digest`` and its bytes, if it is still collectable.

    Its row stays locked meanwhile, so that an upload of the same content waits in ``spare`` and
    then writes the bytes anew.
    """
    row = connection.execute(
        select(GARBAGE.c.digest)
        .where(GARBAGE.c.digest == digest, GARBAGE.c.since < older_than)
        .with_for_update()
    ).one_or_none()
    if row is None:
        return False
    referred_to = connection.execute(
        select(VERSIONS.c.version).where(VERSIONS.c.digest == digest).limit(1)
    ).one_or_none()
    if referred_to is not None:
        return False
    remove_bytes(digest)
    revive(connection, digest)
    return True


def drop_referred_to(connection: Connection, older_than: float) -> None:
    """Forget that some digests were garbage: other adapters still have them."""
    connection.execute(delete(GARBAGE).where(GARBAGE.c.since < older_than, _IS_REFERRED_TO))


def _insert_or_refresh(connection: Connection, digests: object) -> Insert:
    """INSERT … ON CONFLICT, which is the same SQL in both dialects and generic in neither."""
    names = ["digest", "since"]
    if connection.dialect.name == "sqlite":
        lite = sqlite.insert(GARBAGE).from_select(names, digests)  # type: ignore[arg-type]
        return lite.on_conflict_do_update(
            index_elements=["digest"],
            set_={"since": lite.excluded.since},
            where=GARBAGE.c.since < lite.excluded.since,
        )
    other = postgresql.insert(GARBAGE).from_select(names, digests)  # type: ignore[arg-type]
    return other.on_conflict_do_update(
        index_elements=["digest"],
        set_={"since": other.excluded.since},
        where=GARBAGE.c.since < other.excluded.since,
    )
