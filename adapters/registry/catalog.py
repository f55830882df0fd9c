"""The catalog: which names exist, which versions they have, and which one is active.

Owns every rule about names and versions: numbers count up from 1 and are never given out twice, a
version never changes, a deleted name may come back but its old versions do not. Knows digests, not
bytes (``store.py``), and nothing of tensors. Every call is one transaction and reads the database,
so that what another process wrote is seen at once.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    bindparam,
    insert,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError

from shoal.adapters.errors import AdapterConflict, AdapterNameInvalid, AdapterNotFound
from shoal.adapters.registry.database import Database
from shoal.adapters.registry.tables import ADAPTERS, TOTALS, VERSIONS
from shoal.adapters.spec import ADAPTER_NAME, Family

PAGE_MAX = 1000
# Far above any number given out, and within every database's integer.
_VERSION_MAX = 999_999_999

Source = Literal["upload", "shipped"]


@dataclass(frozen=True, slots=True)
class Content:
    """What one version consists of.

    Attributes:
        digest: sha256 (hex) of the canonical record.
        bytes: length of the canonical record.
        packed_elements: elements it takes in the device bank.
        basis_id: what its family's matrices are written in; not that of a base correction, which
            is in the record.
    """

    digest: str
    family: Family
    format: str
    rank: int
    bytes: int
    packed_elements: int
    basis_id: str | None


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """One version of an adapter.

    Attributes:
        created: unix time in seconds.
        active: whether the bare name meant this version when it was read.
    """

    name: str
    version: int
    digest: str
    family: Family
    format: str
    rank: int
    bytes: int
    created: float
    active: bool
    basis_id: str | None
    packed_elements: int


def validate_name(name: str) -> str:
    """Return ``name`` if it is a possible adapter name.

    Raises:
        AdapterNameInvalid: it is not.
    """
    if ADAPTER_NAME.fullmatch(name) is None:
        raise AdapterNameInvalid(
            f"adapter name {name[:200]!r} must be 1 to 128 characters of a-z, 0-9, '.', '_', '-' "
            "and start with a letter or digit"
        )
    return name


class Catalog:
    """Names and versions of one owner's adapters for one base; thread-safe.

    Adapters of other bases in the same database are neither listed nor resolved, but they hold
    their names.

    Args:
        database: shared with other catalogs; not closed by this one.
        base_digest: digest of the open base.
        owner: whose names these are; '' is the only one while there are no keys.
    """

    def __init__(self, database: Database, *, base_digest: str, owner: str = "") -> None:
        self._database = database
        self._base_digest = base_digest
        self._owner = owner
        # Every request resolves its adapter; building the statement costs more than running it.
        named = self._live_versions().where(ADAPTERS.c.name == bindparam("wanted_name"))
        self._active_version = named.where(VERSIONS.c.version == ADAPTERS.c.active_version)
        self._exact_version = named.where(VERSIONS.c.version == bindparam("wanted_version"))

    def claim(self, name: str) -> None:
        """Check that ``publish`` would take ``name`` now; changes nothing.

        Raises:
            AdapterNameInvalid, AdapterConflict: as ``publish``.
        """
        validate_name(name)
        with self._database.read() as connection:
            self._check_base(name, self._adapter(connection, name))

    def publish(self, name: str, content: Content, *, created: float) -> AdapterInfo:
        """Add ``content`` as the next version of ``name`` and make it active.

        Content that ``name`` already has (by digest) is made active as the version it is.

        Raises:
            AdapterNameInvalid: ``name`` breaks the rule.
            AdapterConflict: ``name`` belongs to an adapter of another base.
        """
        validate_name(name)
        with self._write() as connection:
            row = self._adapter(connection, name)
            self._check_base(name, row)
            version = self._place(connection, row, name, content, "upload", created)
            return self._info(connection, name, version)

    def publish_shipped(self, name: str, content: Content, *, created: float) -> AdapterInfo | None:
        """Like ``publish``, for an adapter that comes with the software; a user's choice wins.

        Returns:
            None, with nothing changed, when the name was deleted or rolled back, has a version
            that a user uploaded, belongs to another base, or has had this content before.
        """
        validate_name(name)
        with self._write() as connection:
            row = self._adapter(connection, name)
            if row is not None:
                if row.deleted_at is not None or row.base_digest != self._base_digest:
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
            version = self._place(connection, row, name, content, "shipped", created)
            return self._info(connection, name, version)

    def get(self, name: str, version: int | None = None) -> AdapterInfo:
        """One version of ``name``; by default the active one.

        Raises:
            AdapterNotFound: no such name or version.
        """
        with self._database.read() as connection:
            return self._info(connection, name, version)

    def page(
        self, *, limit: int, after: str | None = None, prefix: str = ""
    ) -> tuple[list[AdapterInfo], str | None]:
        """Active versions by name.

        Args:
            limit: entries at most, from 1; above ``PAGE_MAX`` it counts as that.
            after: only names behind this one; the cursor of the page before.
            prefix: only names that begin so.

        Returns:
            The page, and the cursor of the next one or None.

        Raises:
            AdapterNameInvalid: ``after`` is not a name.
        """
        if limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit}")
        limit = min(limit, PAGE_MAX)
        if prefix and ADAPTER_NAME.fullmatch(prefix) is None:
            return [], None  # no name begins so
        query = (
            self._live_versions()
            .where(VERSIONS.c.version == ADAPTERS.c.active_version)
            .order_by(ADAPTERS.c.name)
            .limit(limit + 1)
        )
        if prefix:
            # '{' follows 'z', the last character of the alphabet.
            query = query.where(ADAPTERS.c.name >= prefix, ADAPTERS.c.name < prefix + "{")
        if after is not None:
            query = query.where(ADAPTERS.c.name > validate_name(after))
        with self._database.read() as connection:
            found = [_to_info(row) for row in connection.execute(query)]
        if len(found) <= limit:
            return found, None
        return found[:limit], found[limit - 1].name

    def versions(self, name: str) -> list[AdapterInfo]:
        """Every version of ``name``, oldest first.

        Raises:
            AdapterNotFound: no such name.
        """
        query = self._live_versions().where(ADAPTERS.c.name == name).order_by(VERSIONS.c.version)
        with self._database.read() as connection:
            found = [_to_info(row) for row in connection.execute(query)]
        if not found:
            raise _not_found(name, None)
        return found

    def activate(self, name: str, version: int) -> AdapterInfo:
        """Let the bare ``name`` mean ``version``.

        Raises:
            AdapterNotFound: no such name or version.
        """
        with self._write() as connection:
            row = self._adapter(connection, name)
            if row is None:
                raise _not_found(name, None)
            self._info(connection, name, version)
            self._set(connection, row.id, active_version=version)
            return self._info(connection, name, version)

    def delete(self, name: str, *, now: float) -> None:
        """Make ``name`` and its versions unknown; the name may be uploaded again.

        Raises:
            AdapterNotFound: no such name.
        """
        with self._write() as connection:
            row = self._adapter(connection, name)
            if row is None or row.deleted_at is not None or row.base_digest != self._base_digest:
                raise _not_found(name, None)
            self._set(connection, row.id, deleted_at=now)
            self._add_to_total(connection, -1)

    def count(self) -> int:
        """How many names there are; one look-up."""
        query = select(TOTALS.c.names).where(*self._total())
        with self._database.read() as connection:
            return int(connection.execute(query).scalar() or 0)

    def check(self) -> None:
        """Assert what must hold for every adapter in the database. O(versions); for tests."""
        numbers: dict[int, list[int]] = {}
        with self._database.write() as connection:
            for row in connection.execute(select(VERSIONS.c.adapter_id, VERSIONS.c.version)):
                numbers.setdefault(row.adapter_id, []).append(row.version)
            rows = connection.execute(select(ADAPTERS)).all()
            totals = connection.execute(select(TOTALS)).all()
        assert len(numbers) == len(rows), "versions without an adapter, or the reverse"
        live = Counter((row.owner, row.base_digest) for row in rows if row.deleted_at is None)
        assert {(row.owner, row.base_digest): row.names for row in totals if row.names} == live
        for row in rows:
            assert ADAPTER_NAME.fullmatch(row.name), row
            assert sorted(numbers[row.id]) == list(range(1, row.next_version)), row
            assert 1 <= row.live_from <= row.active_version < row.next_version, row

    def _check_base(self, name: str, row: Row[Any] | None) -> None:
        if row is not None and row.deleted_at is None and row.base_digest != self._base_digest:
            raise AdapterConflict(
                f"adapter name {name!r} is used by an adapter of another base model; delete "
                "that one (with its base being served) or choose another name"
            )

    def _place(
        self,
        connection: Connection,
        row: Row[Any] | None,
        name: str,
        content: Content,
        source: Source,
        created: float,
    ) -> int:
        """Give ``content`` its version number under ``name`` and make it active."""
        if row is None:
            version = 1
            result = connection.execute(
                insert(ADAPTERS).values(
                    owner=self._owner,
                    name=name,
                    base_digest=self._base_digest,
                    active_version=version,
                    next_version=version + 1,
                    live_from=version,
                )
            )
            assert result.inserted_primary_key is not None
            adapter_id = result.inserted_primary_key[0]
            self._add_to_total(connection, 1)
        else:
            adapter_id = row.id
            live_from = row.live_from
            if row.deleted_at is not None:
                live_from = row.next_version
                self._add_to_total(connection, 1)
            same = connection.execute(
                select(VERSIONS.c.version).where(
                    VERSIONS.c.adapter_id == adapter_id,
                    VERSIONS.c.digest == content.digest,
                    VERSIONS.c.version >= live_from,
                )
            ).scalar()
            if same is not None:
                self._set(connection, adapter_id, active_version=same)
                return int(same)
            version = row.next_version
            self._set(
                connection,
                adapter_id,
                base_digest=self._base_digest,
                active_version=version,
                next_version=version + 1,
                live_from=live_from,
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
                base_digest=self._base_digest,
                source=source,
                created=created,
            )
        )
        return int(version)

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        try:
            with self._database.write() as connection:
                yield connection
        except IntegrityError as error:
            # Not with SQLite, whose writers take turns; elsewhere two may create one name.
            raise AdapterConflict("another change of this adapter came first; try again") from error

    def _adapter(self, connection: Connection, name: str) -> Row[Any] | None:
        """The row of ``name``, deleted or not, held until the transaction ends."""
        return connection.execute(
            select(ADAPTERS)
            .where(ADAPTERS.c.owner == self._owner, ADAPTERS.c.name == name)
            .with_for_update()
        ).one_or_none()

    def _set(self, connection: Connection, adapter_id: int, **values: object) -> None:
        connection.execute(update(ADAPTERS).where(ADAPTERS.c.id == adapter_id).values(**values))

    def _add_to_total(self, connection: Connection, names: int) -> None:
        changed = connection.execute(
            update(TOTALS).where(*self._total()).values(names=TOTALS.c.names + names)
        )
        if changed.rowcount == 0:
            connection.execute(
                insert(TOTALS).values(owner=self._owner, base_digest=self._base_digest, names=names)
            )

    def _total(self) -> tuple[ColumnElement[bool], ...]:
        return TOTALS.c.owner == self._owner, TOTALS.c.base_digest == self._base_digest

    def _live(self) -> tuple[ColumnElement[bool], ...]:
        return (
            ADAPTERS.c.owner == self._owner,
            ADAPTERS.c.base_digest == self._base_digest,
            ADAPTERS.c.deleted_at.is_(None),
        )

    def _live_versions(self) -> Select[Any]:
        """Every version that can be named."""
        return (
            select(ADAPTERS.c.name, ADAPTERS.c.active_version, *VERSIONS.c)
            .join(VERSIONS, VERSIONS.c.adapter_id == ADAPTERS.c.id)
            .where(*self._live(), VERSIONS.c.version >= ADAPTERS.c.live_from)
        )

    def _info(self, connection: Connection, name: str, version: int | None) -> AdapterInfo:
        if version is not None and not 1 <= version <= _VERSION_MAX:
            raise _not_found(name, version)
        query = self._active_version if version is None else self._exact_version
        wanted = {"wanted_name": name, "wanted_version": version}
        row = connection.execute(query, wanted).one_or_none()
        if row is None:
            raise _not_found(name, version)
        return _to_info(row)


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
    )


def _not_found(name: str, version: int | None) -> AdapterNotFound:
    shown = name[:200] if version is None else f"{name[:200]}@{version}"
    return AdapterNotFound(f"adapter {shown!r} does not exist")
