"""Looking up and listing: everything that only reads adapters.

Each statement by itself sees a consistent state. What an owner may not see is not found, by the
same statements as what does not exist.
"""

import heapq
from collections.abc import Mapping
from typing import Any, cast

from sqlalchemy import Connection, Row, Select, bindparam, exists, select, tuple_

from shoal.adapters.registry.database import Database
from shoal.adapters.registry.info import AdapterInfo, Scope
from shoal.adapters.registry.names import EVERYBODY, not_found, split_reference, validate_name
from shoal.adapters.registry.tables import ADAPTERS, SHARES, TOTALS, VERSIONS
from shoal.adapters.spec import ADAPTER_NAME, Family

PAGE_MAX = 1000
# Far above any number given out, and within every database's integer.
_VERSION_MAX = 999_999_999

# Statements are built once: building one costs more than running it, and every request has one.
_COLUMNS = (
    ADAPTERS.c.owner,
    ADAPTERS.c.name,
    ADAPTERS.c.active_version,
    ADAPTERS.c.tags,
    ADAPTERS.c.used,
    *VERSIONS.c,
)
_LIVE = (
    ADAPTERS.c.base_digest == bindparam("base"),
    ADAPTERS.c.deleted_at.is_(None),
    VERSIONS.c.version >= ADAPTERS.c.live_from,
)
_VERSIONS = select(*_COLUMNS).join(VERSIONS, VERSIONS.c.adapter_id == ADAPTERS.c.id).where(*_LIVE)
_IS_ACTIVE = VERSIONS.c.version == ADAPTERS.c.active_version
_IS_WANTED = VERSIONS.c.version == bindparam("wanted_version")
_OWN = _VERSIONS.where(
    ADAPTERS.c.owner == bindparam("wanted_owner"), ADAPTERS.c.name == bindparam("wanted_name")
)
_SHARED = _OWN.where(
    exists().where(
        SHARES.c.owner == ADAPTERS.c.owner,
        SHARES.c.name == ADAPTERS.c.name,
        SHARES.c.grantee.in_([bindparam("reader"), EVERYBODY]),
    )
)
_LOOK_UP: dict[tuple[bool, bool], Select[Any]] = {
    # (one's own, by version)
    (True, False): _OWN.where(_IS_ACTIVE),
    (True, True): _OWN.where(_IS_WANTED),
    (False, False): _SHARED.where(_IS_ACTIVE),
    (False, True): _SHARED.where(_IS_WANTED),
}


def info(
    connection: Connection, scope: Scope, reference: str, version: int | None = None
) -> AdapterInfo:
    """One version of an adapter, by default the active one, or AdapterNotFound."""
    by_version = version is not None
    if version is not None and not 1 <= version <= _VERSION_MAX:
        raise not_found(reference, version)
    wanted, query = _wanted(
        scope, reference, version, _LOOK_UP[True, by_version], _LOOK_UP[False, by_version]
    )
    if by_version:
        wanted["wanted_version"] = version
    found = _infos(connection, scope, query, wanted)
    if not found:
        raise not_found(reference, version)
    return found[0]


def versions(database: Database, scope: Scope, reference: str) -> list[AdapterInfo]:
    """Every version of an adapter, oldest first, or AdapterNotFound."""
    wanted, statement = _wanted(scope, reference, None, _OWN, _SHARED)
    query = statement.order_by(VERSIONS.c.version)
    with database.read() as connection:
        found = _infos(connection, scope, query, wanted)
    if not found:
        raise not_found(reference)
    return found


def page(
    database: Database, scope: Scope, limit: int, after: str | None, prefix: str
) -> tuple[list[AdapterInfo], str | None]:
    """See ``Catalog.page``."""
    limit = _page_size(limit)
    if prefix and ADAPTER_NAME.fullmatch(prefix) is None:
        return [], None  # no name begins so
    query = (
        _VERSIONS.where(ADAPTERS.c.owner == scope.owner, _IS_ACTIVE)
        .order_by(ADAPTERS.c.name)
        .limit(limit + 1)
    )
    if prefix:
        # '{' follows 'z', the last character of the alphabet.
        query = query.where(ADAPTERS.c.name >= prefix, ADAPTERS.c.name < prefix + "{")
    if after is not None:
        query = query.where(ADAPTERS.c.name > validate_name(after))
    with database.read() as connection:
        found = _infos(connection, scope, query)
    if len(found) <= limit:
        return found, None
    return found[:limit], found[limit - 1].name


def shared_page(
    database: Database, scope: Scope, limit: int, after: str | None
) -> tuple[list[AdapterInfo], str | None]:
    """See ``Catalog.shared_page``."""
    limit = _page_size(limit)
    key = tuple_(SHARES.c.owner, SHARES.c.name)
    query = (
        _VERSIONS.join(
            SHARES,
            (SHARES.c.owner == ADAPTERS.c.owner) & (SHARES.c.name == ADAPTERS.c.name),
        )
        .where(_IS_ACTIVE, SHARES.c.owner != scope.owner)
        .order_by(SHARES.c.owner, SHARES.c.name)
        .limit(limit + 1)
    )
    if after is not None:
        whose, _, name = after.partition("/")
        query = query.where(key > (validate_name(whose), validate_name(name)))
    with database.read() as connection:
        # Two walks along an index, where one query would have to sort.
        to_me, to_all = (
            _infos(connection, scope, query.where(SHARES.c.grantee == grantee))
            for grantee in (scope.owner, EVERYBODY)
        )
    found: list[AdapterInfo] = []
    for one in heapq.merge(to_me, to_all, key=_owner_and_name):
        if not found or _owner_and_name(found[-1]) != _owner_and_name(one):
            found.append(one)
    if len(found) <= limit:
        return found, None
    return found[:limit], "/".join(_owner_and_name(found[limit - 1]))


def count(database: Database, scope: Scope) -> int:
    """How many names the owner has for the base; one look-up."""
    query = select(TOTALS.c.names).where(
        TOTALS.c.owner == scope.owner, TOTALS.c.base_digest == scope.base_digest
    )
    with database.read() as connection:
        return int(connection.execute(query).scalar() or 0)


def _page_size(limit: int) -> int:
    if limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    return min(limit, PAGE_MAX)


def _wanted(
    scope: Scope, reference: str, version: int | None, own: Select[Any], shared: Select[Any]
) -> tuple[dict[str, object], Select[Any]]:
    """What to look up, and with which statement."""
    found = split_reference(reference, scope.owner)
    if found is None:
        raise not_found(reference, version)
    owner, name = found
    wanted: dict[str, object] = {"wanted_owner": owner, "wanted_name": name}
    if owner == scope.owner:
        return wanted, own
    return wanted | {"reader": scope.owner}, shared


def _infos(
    connection: Connection,
    scope: Scope,
    query: Select[Any],
    wanted: Mapping[str, object] | None = None,
) -> list[AdapterInfo]:
    values = {"base": scope.base_digest, **(wanted or {})}
    return [_to_info(row) for row in connection.execute(query, values)]


def _owner_and_name(info: AdapterInfo) -> tuple[str, str]:
    return info.owner, info.name


def _to_info(row: Row[Any]) -> AdapterInfo:
    return AdapterInfo(
        name=row.name,
        version=row.version,
        digest=row.digest,
        family=cast(Family, row.family),
        format=row.format,
        rank=row.rank,
        bytes=row.bytes,
        created=row.created,
        active=row.version == row.active_version,
        basis_id=row.basis_id,
        packed_elements=row.packed_elements,
        owner=row.owner,
        tags=row.tags,
        used=row.used,
    )
