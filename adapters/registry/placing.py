"""Changing what a name means: new versions, which one is active, and the end of a name.

Each function works in the transaction of its caller, with the name's row locked by it.
"""

from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, func, insert, select, update

from shoal.adapters.errors import AdapterConflict, AdapterQuotaExceeded
from shoal.adapters.registry import garbage, sharing, totals
from shoal.adapters.registry.info import Content, Scope, Source
from shoal.adapters.registry.keys import Limits
from shoal.adapters.registry.names import not_found, split_reference
from shoal.adapters.registry.tables import ADAPTERS, VERSIONS
from shoal.adapters.registry.totals import Amount


class Placed(NamedTuple):
    """A version, and what its owner has more by it."""

    version: int
    more: Amount


def row_of(connection: Connection, scope: Scope, name: str) -> Row[Any] | None:
    """The row of one's own ``name``, deleted or not, held until the transaction ends."""
    return connection.execute(
        select(ADAPTERS)
        .where(ADAPTERS.c.owner == scope.owner, ADAPTERS.c.name == name)
        .with_for_update()
    ).one_or_none()


def live_row(
    connection: Connection, scope: Scope, reference: str, version: int | None = None
) -> Row[Any]:
    """The row of one's own adapter, held until the transaction ends, or AdapterNotFound."""
    found = split_reference(reference, scope.owner)
    if found is None or found[0] != scope.owner:
        raise not_found(reference, version)
    row = row_of(connection, scope, found[1])
    if row is None or row.deleted_at is not None or row.base_digest != scope.base_digest:
        raise not_found(reference, version)
    return row


def change(connection: Connection, adapter_id: int, **values: object) -> None:
    """Set columns of a name's row."""
    connection.execute(update(ADAPTERS).where(ADAPTERS.c.id == adapter_id).values(**values))


def claim(
    connection: Connection,
    scope: Scope,
    name: str,
    content: Content | None,
    limits: Limits | None,
) -> None:
    """See ``Catalog.claim``."""
    row = row_of(connection, scope, name)
    _check_base(scope, name, row)
    if limits is None:
        return
    is_new = row is None or row.deleted_at is not None
    has = totals.used(connection, scope.owner)
    if content is not None:
        known = row is not None and _version_of(connection, row.id, content.digest)
        if not known:
            totals.check_room(has, Amount(int(is_new), content.bytes), limits)
    elif is_new:
        totals.check_room(has, Amount(1, 0), limits)
        if limits.bytes is not None and has.bytes >= limits.bytes:
            raise AdapterQuotaExceeded("bytes", allowed=limits.bytes, used=has.bytes, needed=None)


def publish(
    connection: Connection,
    scope: Scope,
    name: str,
    content: Content,
    created: float,
    limits: Limits | None,
) -> int:
    """See ``Catalog.publish``. Returns the version."""
    row = row_of(connection, scope, name)
    _check_base(scope, name, row)
    placed = place(connection, scope, row, name, content, "upload", created)
    totals.add(connection, scope.owner, scope.base_digest, placed.more, limits=limits)
    return placed.version


def publish_shipped(
    connection: Connection, scope: Scope, name: str, content: Content, created: float
) -> int | None:
    """See ``Catalog.publish_shipped``. Returns the version, if there is one."""
    row = row_of(connection, scope, name)
    if row is not None:
        if row.deleted_at is not None or row.base_digest != scope.base_digest:
            return None
        if row.active_version != row.next_version - 1:
            return None
        known = connection.execute(
            select(VERSIONS.c.digest, VERSIONS.c.source)
            .where(VERSIONS.c.adapter_id == row.id)
            .order_by(VERSIONS.c.version)
        ).all()
        if any(v.source == "upload" or v.digest == content.digest for v in known):
            return None
    placed = place(connection, scope, row, name, content, "shipped", created)
    totals.add(connection, scope.owner, scope.base_digest, placed.more)
    return placed.version


def place(
    connection: Connection,
    scope: Scope,
    row: Row[Any] | None,
    name: str,
    content: Content,
    source: Source,
    created: float,
) -> Placed:
    """Give ``content`` its version number under ``name`` and make it active.

    What the owner has more by it is for the caller to add to the totals, at the end.

    Args:
        row: of ``name``, deleted or not; None if there is none.
    """
    if row is None:
        version = 1
        result = connection.execute(
            insert(ADAPTERS).values(
                owner=scope.owner,
                name=name,
                base_digest=scope.base_digest,
                active_version=version,
                next_version=version + 1,
                live_from=version,
            )
        )
        assert result.inserted_primary_key is not None
        adapter_id = result.inserted_primary_key[0]
        is_new = True
    else:
        adapter_id = row.id
        is_new = row.deleted_at is not None
        same = _version_of(connection, adapter_id, content.digest)
        if same is not None:
            change(connection, adapter_id, active_version=same)
            return Placed(same, Amount(0, 0))
        version = row.next_version
        change(
            connection,
            adapter_id,
            base_digest=scope.base_digest,
            active_version=version,
            next_version=version + 1,
            live_from=version if is_new else row.live_from,
            deleted_at=None,
        )
    connection.execute(
        insert(VERSIONS).values(
            adapter_id=adapter_id,
            version=version,
            digest=content.digest,
            family=content.family,
            format=content.format,
            rank=content.rank,
            bytes=content.bytes,
            packed_elements=content.packed_elements,
            basis_id=content.basis_id,
            base_digest=scope.base_digest,
            source=source,
            created=created,
        )
    )
    garbage.revive(connection, content.digest)
    return Placed(version, Amount(int(is_new), content.bytes))


def remove(connection: Connection, scope: Scope, reference: str, now: float) -> None:
    """See ``Catalog.delete``."""
    row = live_row(connection, scope, reference)
    change(connection, row.id, deleted_at=now, tags={}, used=None)
    sharing.unshare_with_all(connection, row)
    size = connection.execute(
        select(func.sum(VERSIONS.c.bytes)).where(VERSIONS.c.adapter_id == row.id)
    ).scalar_one()
    garbage.bury(connection, row.id, now)
    totals.add(connection, scope.owner, scope.base_digest, Amount(-1, -int(size)))


def _check_base(scope: Scope, name: str, row: Row[Any] | None) -> None:
    if row is not None and row.deleted_at is None and row.base_digest != scope.base_digest:
        raise AdapterConflict(
            f"adapter name {name!r} is used by an adapter of another base model; delete "
            "that one (with its base being served) or choose another name"
        )


def _version_of(connection: Connection, adapter_id: int, digest: str) -> int | None:
    """The live version that has this content already."""
    return connection.execute(
        select(VERSIONS.c.version).where(
            VERSIONS.c.adapter_id == adapter_id, VERSIONS.c.digest == digest
        )
    ).scalar()
