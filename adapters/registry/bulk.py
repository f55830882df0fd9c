"""Many adapters in one transaction: what bulk import writes to the catalog.

The rules about names and versions are those of ``placing.py``; here is only what makes a thousand
new names cost a few statements.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from sqlalchemy import Connection, Row, delete, insert, select

from shoal.adapters.registry import placing, totals
from shoal.adapters.registry.database import LONG_TIMEOUT_S, Database
from shoal.adapters.registry.info import Content, Scope, Source
from shoal.adapters.registry.tables import ADAPTERS, GARBAGE, SHARES, VERSIONS
from shoal.adapters.registry.totals import Amount

# Parameters of one statement; SQLite takes 32,766.
_CHUNK = 500

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Version:
    """One version of an adapter that comes or goes in bulk."""

    number: int
    content: Content
    created: float
    source: Source


@dataclass(frozen=True, slots=True)
class Adapter:
    """A name with its versions, as it is taken from one registry to another.

    Attributes:
        versions: every live one, numbered without gaps; ``active`` is the number of one of them.
        grantees: whom it is shared with, as in the table.
    """

    owner: str
    name: str
    base_digest: str
    active: int
    versions: tuple[Version, ...]
    tags: Mapping[str, str] = field(default_factory=dict)
    grantees: tuple[str, ...] = ()

    @property
    def active_version(self) -> Version:
        """The one that the bare name means."""
        return self.versions[self.active - self.versions[0].number]


@dataclass(slots=True)
class Outcome:
    """What became of adapters: new names, new versions of known ones, nothing to do, refused.

    ``mended`` are records that were missing or damaged and are there again.
    """

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    refused: int = 0
    mended: int = 0


def missing(database: Database, adapters: Sequence[Adapter]) -> list[Adapter]:
    """Those of ``adapters`` whose active content their name does not have yet."""
    with database.read(limit_s=LONG_TIMEOUT_S) as connection:
        rows = _rows(connection, adapters)
        known = _digests(connection, [row.id for row in rows.values() if row.deleted_at is None])
    return [a for a in adapters if not _has(rows.get((a.owner, a.name)), known, a)]


def referred(database: Database, digests: Iterable[str]) -> set[str]:
    """Those of ``digests`` that live versions have, whosever they are."""
    found: set[str] = set()
    with database.read(limit_s=LONG_TIMEOUT_S) as connection:
        for some in _chunks(digests):
            query = select(VERSIONS.c.digest).where(VERSIONS.c.digest.in_(some)).distinct()
            found.update(connection.execute(query).scalars())
    return found


def publish_many(database: Database, adapters: Sequence[Adapter]) -> Outcome:
    """Publish all of ``adapters``, or none of them when it raises.

    A new name comes with its versions, their numbers, tags and shares. A name that exists, or did
    before, gets the active version as its next one, unless it has that content already: then
    nothing changes. One that another base has is refused. The bytes are in the store already.

    Raises:
        RegistryUnavailable.
    """

    def work(connection: Connection) -> Outcome:
        outcome = Outcome()
        more: dict[tuple[str, str], Amount] = {}
        rows = _rows(connection, adapters)
        known = _digests(connection, [row.id for row in rows.values() if row.deleted_at is None])
        new = []
        for adapter in adapters:
            row = rows.get((adapter.owner, adapter.name))
            if row is None:
                new.append(adapter)
            elif row.deleted_at is None and row.base_digest != adapter.base_digest:
                outcome.refused += 1
            elif _has(row, known, adapter):
                outcome.unchanged += 1
            else:
                scope = Scope(adapter.owner, adapter.base_digest)
                version = adapter.active_version
                placed = placing.place(
                    connection,
                    scope,
                    row,
                    adapter.name,
                    version.content,
                    version.source,
                    version.created,
                )
                _count(more, adapter, placed.more)
                outcome.updated += 1
        _insert(connection, new)
        outcome.added = len(new)
        for adapter in new:
            size = sum(version.content.bytes for version in adapter.versions)
            _count(more, adapter, Amount(1, size))
        totals.add_many(connection, more)  # last, because others wait here
        return outcome

    return database.transact(work)


def _insert(connection: Connection, adapters: Sequence[Adapter]) -> None:
    if not adapters:
        return
    values: list[dict[str, Any]] = [
        {
            "owner": adapter.owner,
            "name": adapter.name,
            "base_digest": adapter.base_digest,
            "active_version": adapter.active,
            "next_version": adapter.versions[-1].number + 1,
            "live_from": adapter.versions[0].number,
            "tags": dict(adapter.tags),
        }
        for adapter in adapters
    ]
    connection.execute(insert(ADAPTERS), values)
    ids = {key: row.id for key, row in _rows(connection, adapters).items()}
    values = [
        {
            "adapter_id": ids[adapter.owner, adapter.name],
            "version": version.number,
            "digest": version.content.digest,
            "family": version.content.family,
            "format": version.content.format,
            "rank": version.content.rank,
            "bytes": version.content.bytes,
            "packed_elements": version.content.packed_elements,
            "basis_id": version.content.basis_id,
            "base_digest": adapter.base_digest,
            "source": version.source,
            "created": version.created,
        }
        for adapter in adapters
        for version in adapter.versions
    ]
    connection.execute(insert(VERSIONS), values)
    for some in _chunks(value["digest"] for value in values):
        connection.execute(delete(GARBAGE).where(GARBAGE.c.digest.in_(some)))
    shares = [
        {"owner": adapter.owner, "name": adapter.name, "grantee": grantee}
        for adapter in adapters
        for grantee in adapter.grantees
    ]
    if shares:
        connection.execute(insert(SHARES), shares)


def _count(more: dict[tuple[str, str], Amount], adapter: Adapter, amount: Amount) -> None:
    key = adapter.owner, adapter.base_digest
    names, size = more.get(key, Amount(0, 0))
    more[key] = Amount(names + amount.names, size + amount.bytes)


def _rows(connection: Connection, adapters: Iterable[Adapter]) -> dict[tuple[str, str], Row[Any]]:
    """The catalog's rows of these names, deleted ones too."""
    names: dict[str, list[str]] = {}
    for adapter in adapters:
        names.setdefault(adapter.owner, []).append(adapter.name)
    found = {}
    for owner, own in names.items():
        for some in _chunks(own):
            query = select(ADAPTERS).where(ADAPTERS.c.owner == owner, ADAPTERS.c.name.in_(some))
            for row in connection.execute(query):
                found[row.owner, row.name] = row
    return found


def _digests(connection: Connection, ids: Iterable[int]) -> set[tuple[int, str]]:
    found: set[tuple[int, str]] = set()
    for some in _chunks(ids):
        query = select(VERSIONS.c.adapter_id, VERSIONS.c.digest)
        rows = connection.execute(query.where(VERSIONS.c.adapter_id.in_(some)))
        found.update((row.adapter_id, row.digest) for row in rows)
    return found


def _has(row: Row[Any] | None, known: set[tuple[int, str]], adapter: Adapter) -> bool:
    return row is not None and (row.id, adapter.active_version.content.digest) in known


def _chunks(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while some := list(islice(iterator, _CHUNK)):
        yield some
