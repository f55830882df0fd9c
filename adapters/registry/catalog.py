"""The catalog: which names exist, which versions they have, and which one is active.

Owns every rule about names and versions: numbers count up from 1 and are never given out twice, a
version never changes, a deleted name may come back but its old versions do not, and who sees what.
Knows digests, not bytes (``store.py``), and nothing of tensors. Every call is one transaction and
reads the database, so that what another process wrote is seen at once.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar, cast

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    bindparam,
    delete,
    exists,
    func,
    insert,
    select,
    tuple_,
    update,
)
from sqlalchemy.exc import IntegrityError

from shoal.adapters.errors import AdapterConflict, AdapterQuotaExceeded, AdapterRejected
from shoal.adapters.registry import garbage, totals
from shoal.adapters.registry.database import Database
from shoal.adapters.registry.keys import Limits
from shoal.adapters.registry.names import (
    EVERYBODY,
    not_found,
    split_reference,
    validate_name,
    validate_owner,
    validate_tags,
)
from shoal.adapters.registry.tables import (
    ADAPTERS,
    GARBAGE,
    OWNERS,
    SHARES,
    TOTALS,
    VERSIONS,
)
from shoal.adapters.registry.totals import Amount
from shoal.adapters.spec import ADAPTER_NAME, Family

PAGE_MAX = 1000
# Far above any number given out, and within every database's integer.
_VERSION_MAX = 999_999_999
# To whom one adapter may be shared; sharing with everybody counts as one.
GRANTEES_MAX = 1000

Source = Literal["upload", "shipped"]
T = TypeVar("T")


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
        created: unix time in seconds; of the version, not of its name.
        active: whether the bare name meant this version when it was read.
        owner: whose it is; '' while there are no keys.
        tags: of the name, not of the version.
        used: unix time of the name's last use, to a minute or so; None if there was none.
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
    owner: str = ""
    tags: Mapping[str, str] = field(default_factory=dict, hash=False)
    used: float | None = None

    @property
    def reference(self) -> str:
        """``owner/name``, or the bare name where there are no owners: unique in the registry."""
        return f"{self.owner}/{self.name}" if self.owner else self.name


class _Placed(NamedTuple):
    """A version, and what its owner has more by it."""

    version: int
    more: Amount


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


class Catalog:
    """What one owner sees of the adapters for one base; thread-safe and cheap to make.

    A *reference* is the bare ``name`` of an adapter of one's own, or ``owner/name`` of one that
    was shared. What is not visible is answered word for word like what does not exist. Only an
    adapter's owner changes it. Adapters of other bases in the same database are neither listed
    nor resolved, but they hold their names.

    Args:
        database: shared with other catalogs; not closed by this one.
        base_digest: digest of the open base.
        owner: who asks, and whose bare names are; '' is the only one while there are no keys.
    """

    def __init__(self, database: Database, *, base_digest: str, owner: str = "") -> None:
        self._database = database
        self._base_digest = base_digest
        self._owner = owner

    def claim(
        self, name: str, *, content: Content | None = None, limits: Limits | None = None
    ) -> None:
        """Check that ``publish`` would take ``name`` now; changes nothing.

        Args:
            content, limits: as for ``publish``. Without content, no more is refused than what
                would be with any.

        Raises:
            AdapterNameInvalid, AdapterConflict, AdapterQuotaExceeded: as ``publish``.
        """
        validate_name(name)
        with self._database.read() as connection:
            row = self._adapter(connection, name)
            self._check_base(name, row)
            if limits is None:
                return
            is_new = row is None or row.deleted_at is not None
            has = totals.used(connection, self._owner)
            if content is not None:
                known = row is not None and self._version_of(connection, row.id, content.digest)
                if not known:
                    totals.check_room(has, Amount(int(is_new), content.bytes), limits)
            elif is_new:
                totals.check_room(has, Amount(1, 0), limits)
                if limits.bytes is not None and has.bytes >= limits.bytes:
                    raise AdapterQuotaExceeded(
                        "bytes", allowed=limits.bytes, used=has.bytes, needed=None
                    )

    def publish(
        self, name: str, content: Content, *, created: float, limits: Limits | None = None
    ) -> AdapterInfo:
        """Add ``content`` as the next version of ``name`` and make it active.

        Content that ``name`` already has (by digest) is made active as the version it is.

        Args:
            limits: the owner may have no more adapters and bytes than these, whoever else uploads
                for it at the same time. What is made active again needs no room.

        Raises:
            AdapterNameInvalid: ``name`` breaks the rule.
            AdapterConflict: ``name`` belongs to an adapter of another base.
            AdapterQuotaExceeded: there is no room within ``limits``.
        """
        validate_name(name)

        def work(connection: Connection) -> AdapterInfo:
            row = self._adapter(connection, name)
            self._check_base(name, row)
            placed = self._place(connection, row, name, content, "upload", created)
            totals.add(connection, self._owner, self._base_digest, placed.more, limits=limits)
            return self._info(connection, name, placed.version)

        return self._transact(work)

    def publish_shipped(self, name: str, content: Content, *, created: float) -> AdapterInfo | None:
        """Like ``publish``, for an adapter that comes with the software; a user's choice wins.

        Returns:
            None, with nothing changed, when the name was deleted or rolled back, has a version
            that a user uploaded, belongs to another base, or has had this content before.
        """
        validate_name(name)

        def work(connection: Connection) -> AdapterInfo | None:
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
            placed = self._place(connection, row, name, content, "shipped", created)
            totals.add(connection, self._owner, self._base_digest, placed.more)
            return self._info(connection, name, placed.version)

        return self._transact(work)

    def get(self, reference: str, version: int | None = None) -> AdapterInfo:
        """One version of an adapter; by default the active one.

        Raises:
            AdapterNotFound: no such name or version, or not visible.
        """
        with self._database.read() as connection:
            return self._info(connection, reference, version)

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
            _VERSIONS.where(ADAPTERS.c.owner == self._owner, _IS_ACTIVE)
            .order_by(ADAPTERS.c.name)
            .limit(limit + 1)
        )
        if prefix:
            # '{' follows 'z', the last character of the alphabet.
            query = query.where(ADAPTERS.c.name >= prefix, ADAPTERS.c.name < prefix + "{")
        if after is not None:
            query = query.where(ADAPTERS.c.name > validate_name(after))
        with self._database.read() as connection:
            found = self._infos(connection, query)
        if len(found) <= limit:
            return found, None
        return found[:limit], found[limit - 1].name

    def shared_page(
        self, *, limit: int, after: str | None = None
    ) -> tuple[list[AdapterInfo], str | None]:
        """Active versions of what others share with this owner, by owner and name.

        Args:
            limit: as for ``page``.
            after: the cursor of the page before, ``owner/name``.

        Raises:
            AdapterNameInvalid: ``after`` is not a cursor.
        """
        if limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit}")
        limit = min(limit, PAGE_MAX)
        key = tuple_(SHARES.c.owner, SHARES.c.name)
        query = (
            _VERSIONS.join(
                SHARES,
                (SHARES.c.owner == ADAPTERS.c.owner) & (SHARES.c.name == ADAPTERS.c.name),
            )
            .where(_IS_ACTIVE, SHARES.c.owner != self._owner)
            .order_by(SHARES.c.owner, SHARES.c.name)
            .limit(limit + 1)
        )
        if after is not None:
            whose, _, name = after.partition("/")
            query = query.where(key > (validate_name(whose), validate_name(name)))
        with self._database.read() as connection:
            # Two walks along an index, where one query would have to sort.
            to_me, to_all = (
                self._infos(connection, query.where(SHARES.c.grantee == grantee))
                for grantee in (self._owner, EVERYBODY)
            )
        found: list[AdapterInfo] = []
        for info in heapq.merge(to_me, to_all, key=_owner_and_name):
            if not found or _owner_and_name(found[-1]) != _owner_and_name(info):
                found.append(info)
        if len(found) <= limit:
            return found, None
        return found[:limit], "/".join(_owner_and_name(found[limit - 1]))

    def versions(self, reference: str) -> list[AdapterInfo]:
        """Every version of an adapter, oldest first.

        Raises:
            AdapterNotFound: no such name, or not visible.
        """
        wanted, statement = self._wanted(reference, None, _OWN, _SHARED)
        query = statement.order_by(VERSIONS.c.version)
        with self._database.read() as connection:
            found = self._infos(connection, query, wanted)
        if not found:
            raise not_found(reference)
        return found

    def activate(self, name: str, version: int) -> AdapterInfo:
        """Let the bare ``name`` mean ``version``.

        Raises:
            AdapterNotFound: no such name or version.
        """

        def work(connection: Connection) -> AdapterInfo:
            row = self._live_adapter(connection, name, version)
            self._info(connection, name, version)
            self._set(connection, row.id, active_version=version)
            return self._info(connection, name, version)

        return self._transact(work)

    def tag(self, name: str, tags: Mapping[str, str]) -> AdapterInfo:
        """Give ``name`` these tags and no others.

        Raises:
            AdapterNotFound: no such name.
            AdapterRejected: more or longer than ``names.validate_tags`` allows.
        """
        kept = validate_tags(tags)

        def work(connection: Connection) -> AdapterInfo:
            self._set(connection, self._live_adapter(connection, name).id, tags=kept)
            return self._info(connection, name, None)

        return self._transact(work)

    def delete(self, name: str, *, now: float) -> None:
        """Make ``name`` and its versions unknown; the name may be uploaded again.

        Nobody sees it any more, whoever it was shared with; a later upload is not shared.

        Raises:
            AdapterNotFound: no such name.
        """

        def work(connection: Connection) -> None:
            row = self._live_adapter(connection, name)
            self._set(connection, row.id, deleted_at=now, tags={}, used=None)
            connection.execute(delete(SHARES).where(*_shares_of(row)))
            size = connection.execute(
                select(func.sum(VERSIONS.c.bytes)).where(VERSIONS.c.adapter_id == row.id)
            ).scalar_one()
            garbage.bury(connection, row.id, now)
            totals.add(connection, self._owner, self._base_digest, Amount(-1, -int(size)))

        self._transact(work)

    def share(self, name: str, grantee: str | None) -> None:
        """Let ``grantee`` see ``name`` as ``owner/name``; nothing happens if it does already.

        Args:
            grantee: an owner, whether there is a key for it or not; None is everybody.

        Raises:
            AdapterNotFound: no such name.
            AdapterRejected: ``grantee`` cannot be an owner or is this one, or ``name`` is shared
                with ``GRANTEES_MAX`` others, or has no owner that it could be referred to by.
        """
        whom = EVERYBODY if grantee is None else validate_owner(grantee)
        validate_owner(self._owner)
        if whom == self._owner:
            raise AdapterRejected(f"grantee {whom!r}", "must be another than the owner")

        def work(connection: Connection) -> None:
            row = self._live_adapter(connection, name)
            known = connection.execute(select(SHARES.c.grantee).where(*_shares_of(row))).scalars()
            grantees = set(known)
            if whom in grantees:
                return
            if len(grantees) >= GRANTEES_MAX:
                raise AdapterRejected(
                    f"adapter {name!r}", f"is shared with {GRANTEES_MAX} others, which is the limit"
                )
            connection.execute(insert(SHARES).values(owner=row.owner, name=row.name, grantee=whom))

        self._transact(work)

    def unshare(self, name: str, grantee: str | None) -> None:
        """Undo ``share`` with the same ``grantee``; nothing happens if there was none.

        Raises:
            AdapterNotFound: no such name.
            AdapterRejected: ``grantee`` cannot be an owner.
        """
        whom = EVERYBODY if grantee is None else validate_owner(grantee)

        def work(connection: Connection) -> None:
            row = self._live_adapter(connection, name)
            connection.execute(delete(SHARES).where(*_shares_of(row), SHARES.c.grantee == whom))

        self._transact(work)

    def grantees(self, name: str) -> list[str | None]:
        """With whom ``name`` is shared, sorted; None, which comes first, is everybody.

        Raises:
            AdapterNotFound: no such name.
        """
        with self._database.read() as connection:
            row = self._live_adapter(connection, name)
            query = select(SHARES.c.grantee).where(*_shares_of(row)).order_by(SHARES.c.grantee)
            found = connection.execute(query).scalars().all()
        return [None if grantee == EVERYBODY else grantee for grantee in found]

    def spare(self, digest: str, *, now: float) -> None:
        """Call before writing bytes that may be stored already: nobody will collect them soon."""
        query = select(GARBAGE.c.since).where(GARBAGE.c.digest == digest)
        with self._database.read() as connection:
            if connection.execute(query).one_or_none() is None:
                return
        self._transact(lambda connection: garbage.spare(connection, digest, now))

    def collectable(self, older_than: float, *, limit: int = PAGE_MAX) -> list[str]:
        """Digests that no version has, of any owner or base, since before ``older_than``.

        ``older_than`` must leave uploads, running requests and clocks that differ their time.
        """
        with self._database.read() as connection:
            return garbage.collectable(connection, older_than, limit)

    def forget(
        self,
        digests: Iterable[str],
        *,
        older_than: float,
        remove_bytes: Callable[[str], None],
    ) -> int:
        """Remove what is still collectable of ``digests``.

        Args:
            remove_bytes: removes a digest from the store. It is called in the transaction that
                forgets the digest, so that an upload of the same content waits for it. What it
                raises is passed on: that digest and the rest stay collectable.

        Returns:
            How many were removed.
        """
        removed = 0
        for digest in digests:

            def work(connection: Connection, digest: str = digest) -> bool:
                return garbage.remove(connection, digest, older_than, remove_bytes)

            removed += self._transact(work)
        self._transact(lambda connection: garbage.drop_referred_to(connection, older_than))
        return removed

    def count(self) -> int:
        """How many names there are; one look-up."""
        query = select(TOTALS.c.names).where(
            TOTALS.c.owner == self._owner, TOTALS.c.base_digest == self._base_digest
        )
        with self._database.read() as connection:
            return int(connection.execute(query).scalar() or 0)

    def check(self) -> None:
        """Assert what must hold for every adapter in the database. O(versions); for tests."""
        numbers: dict[int, list[int]] = {}
        sizes: Counter[int] = Counter()
        with self._database.write() as connection:
            columns = VERSIONS.c.adapter_id, VERSIONS.c.version, VERSIONS.c.bytes
            for row in connection.execute(select(*columns)):
                numbers.setdefault(row.adapter_id, []).append(row.version)
                sizes[row.adapter_id] += row.bytes
            rows = connection.execute(select(ADAPTERS)).all()
            totals = connection.execute(select(TOTALS)).all()
            owners = connection.execute(select(OWNERS)).all()
            shared = connection.execute(select(SHARES.c.owner, SHARES.c.name)).all()
        live = [row for row in rows if row.deleted_at is None]
        counted = Counter((row.owner, row.base_digest) for row in live)
        assert {(row.owner, row.base_digest): row.names for row in totals if row.names} == counted
        have: dict[str, Amount] = {}
        for row in live:
            names, size = have.get(row.owner, Amount(0, 0))
            have[row.owner] = Amount(names + 1, size + sizes[row.id])
        assert {row.owner: Amount(row.names, row.bytes) for row in owners if row.names} == have
        assert not [row for row in owners if row.bytes and not row.names]
        assert set(map(tuple, shared)) <= {(row.owner, row.name) for row in live}
        assert set(numbers) == {row.id for row in live}, "versions without an adapter, or reverse"
        for row in rows:
            assert ADAPTER_NAME.fullmatch(row.name), row
            assert 1 <= row.live_from <= row.active_version < row.next_version, row
        for row in live:
            assert sorted(numbers[row.id]) == list(range(row.live_from, row.next_version)), row

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
    ) -> _Placed:
        """Give ``content`` its version number under ``name`` and make it active.

        What the owner has more by it is for the caller to add to the totals, at the end.
        """
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
            is_new = True
        else:
            adapter_id = row.id
            is_new = row.deleted_at is not None
            same = self._version_of(connection, adapter_id, content.digest)
            if same is not None:
                self._set(connection, adapter_id, active_version=same)
                return _Placed(same, Amount(0, 0))
            version = row.next_version
            self._set(
                connection,
                adapter_id,
                base_digest=self._base_digest,
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
                base_digest=self._base_digest,
                source=source,
                created=created,
            )
        )
        garbage.revive(connection, content.digest)
        return _Placed(version, Amount(int(is_new), content.bytes))

    def _version_of(self, connection: Connection, adapter_id: int, digest: str) -> int | None:
        """The live version that has this content already."""
        return connection.execute(
            select(VERSIONS.c.version).where(
                VERSIONS.c.adapter_id == adapter_id, VERSIONS.c.digest == digest
            )
        ).scalar()

    def _transact(self, work: Callable[[Connection], T]) -> T:
        try:
            return self._database.transact(work)
        except IntegrityError as error:
            raise AdapterConflict("another change of this adapter came first; try again") from error

    def _adapter(self, connection: Connection, name: str) -> Row[Any] | None:
        """The row of ``name``, deleted or not, held until the transaction ends."""
        return connection.execute(
            select(ADAPTERS)
            .where(ADAPTERS.c.owner == self._owner, ADAPTERS.c.name == name)
            .with_for_update()
        ).one_or_none()

    def _live_adapter(
        self, connection: Connection, name: str, version: int | None = None
    ) -> Row[Any]:
        """The row of one's own ``name``, held until the transaction ends, or AdapterNotFound."""
        found = split_reference(name, self._owner)
        if found is None or found[0] != self._owner:
            raise not_found(name, version)
        row = self._adapter(connection, found[1])
        if row is None or row.deleted_at is not None or row.base_digest != self._base_digest:
            raise not_found(name, version)
        return row

    def _set(self, connection: Connection, adapter_id: int, **values: object) -> None:
        connection.execute(update(ADAPTERS).where(ADAPTERS.c.id == adapter_id).values(**values))

    def _infos(
        self, connection: Connection, query: Select[Any], wanted: Mapping[str, object] | None = None
    ) -> list[AdapterInfo]:
        values = {"base": self._base_digest, **(wanted or {})}
        return [_to_info(row) for row in connection.execute(query, values)]

    def _wanted(
        self, reference: str, version: int | None, own: Select[Any], shared: Select[Any]
    ) -> tuple[dict[str, object], Select[Any]]:
        """What to look up, and with which statement."""
        found = split_reference(reference, self._owner)
        if found is None:
            raise not_found(reference, version)
        owner, name = found
        wanted: dict[str, object] = {"wanted_owner": owner, "wanted_name": name}
        if owner == self._owner:
            return wanted, own
        return wanted | {"reader": self._owner}, shared

    def _info(self, connection: Connection, reference: str, version: int | None) -> AdapterInfo:
        by_version = version is not None
        if version is not None and not 1 <= version <= _VERSION_MAX:
            raise not_found(reference, version)
        wanted, query = self._wanted(
            reference, version, _LOOK_UP[True, by_version], _LOOK_UP[False, by_version]
        )
        if by_version:
            wanted["wanted_version"] = version
        found = self._infos(connection, query, wanted)
        if not found:
            raise not_found(reference, version)
        return found[0]


def _owner_and_name(info: AdapterInfo) -> tuple[str, str]:
    return info.owner, info.name


def _shares_of(row: Row[Any]) -> tuple[ColumnElement[bool], ...]:
    return SHARES.c.owner == row.owner, SHARES.c.name == row.name


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
