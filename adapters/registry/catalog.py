"""The catalog: which names exist, which versions they have, and which one is active.

Owns every rule about names and versions: numbers count up from 1 and are never given out twice, a
version never changes, a deleted name may come back but its old versions do not, and who sees what.
Knows digests, not bytes (``store.py``), and nothing of tensors. Every call is one transaction and
reads the database, so that what another process wrote is seen at once.

Here is what can be asked; how it is done is in ``lookup.py`` (reading), ``placing.py`` (versions),
``sharing.py``, ``totals.py`` (counts and limits) and ``garbage.py``.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from sqlalchemy import Connection, select
from sqlalchemy.exc import IntegrityError

from shoal.adapters.errors import AdapterConflict, AdapterRejected
from shoal.adapters.registry import checking, garbage, lookup, placing, sharing
from shoal.adapters.registry.database import Database
from shoal.adapters.registry.info import AdapterInfo, Content, Scope, Source
from shoal.adapters.registry.keys import Limits
from shoal.adapters.registry.lookup import PAGE_MAX
from shoal.adapters.registry.names import validate_name, validate_owner, validate_tags
from shoal.adapters.registry.tables import GARBAGE

__all__ = ["PAGE_MAX", "AdapterInfo", "Catalog", "Content", "Source"]

T = TypeVar("T")


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
        self._scope = Scope(owner, base_digest)

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
            placing.claim(connection, self._scope, name, content, limits)

    def publish(
        self,
        name: str,
        content: Content,
        *,
        created: float,
        limits: Limits | None = None,
        before_commit: Callable[[], None] | None = None,
    ) -> AdapterInfo:
        """Add ``content`` as the next version of ``name`` and make it active.

        Content that ``name`` already has (by digest) is made active as the version it is.

        Args:
            limits: the owner may have no more adapters and bytes than these, whoever else uploads
                for it at the same time. What is made active again needs no room.
            before_commit: what it raises is passed on, and nothing has changed.

        Raises:
            AdapterNameInvalid: ``name`` breaks the rule.
            AdapterConflict: ``name`` belongs to an adapter of another base.
            AdapterQuotaExceeded: there is no room within ``limits``.
        """
        validate_name(name)

        def work(connection: Connection) -> AdapterInfo:
            version = placing.publish(connection, self._scope, name, content, created, limits)
            info = lookup.info(connection, self._scope, name, version)
            if before_commit is not None:
                before_commit()
            return info

        return self._transact(work)

    def publish_shipped(self, name: str, content: Content, *, created: float) -> AdapterInfo | None:
        """Like ``publish``, for an adapter that comes with the software; a user's choice wins.

        Returns:
            None, with nothing changed, when the name was deleted or rolled back, has a version
            that a user uploaded, belongs to another base, or has had this content before.
        """
        validate_name(name)

        def work(connection: Connection) -> AdapterInfo | None:
            version = placing.publish_shipped(connection, self._scope, name, content, created)
            return None if version is None else lookup.info(connection, self._scope, name, version)

        return self._transact(work)

    def get(self, reference: str, version: int | None = None) -> AdapterInfo:
        """One version of an adapter; by default the active one.

        Raises:
            AdapterNotFound: no such name or version, or not visible.
        """
        with self._database.read() as connection:
            return lookup.info(connection, self._scope, reference, version)

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
        return lookup.page(self._database, self._scope, limit, after, prefix)

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
        return lookup.shared_page(self._database, self._scope, limit, after)

    def versions(self, reference: str) -> list[AdapterInfo]:
        """Every version of an adapter, oldest first.

        Raises:
            AdapterNotFound: no such name, or not visible.
        """
        return lookup.versions(self._database, self._scope, reference)

    def activate(self, name: str, version: int) -> AdapterInfo:
        """Let the bare ``name`` mean ``version``.

        Raises:
            AdapterNotFound: no such name or version.
        """

        def work(connection: Connection) -> AdapterInfo:
            row = placing.live_row(connection, self._scope, name, version)
            lookup.info(connection, self._scope, name, version)
            placing.change(connection, row.id, active_version=version)
            return lookup.info(connection, self._scope, name, version)

        return self._transact(work)

    def tag(self, name: str, tags: Mapping[str, str]) -> AdapterInfo:
        """Give ``name`` these tags and no others.

        Raises:
            AdapterNotFound: no such name.
            AdapterRejected: more or longer than ``names.validate_tags`` allows.
        """
        kept = validate_tags(tags)

        def work(connection: Connection) -> AdapterInfo:
            row = placing.live_row(connection, self._scope, name)
            placing.change(connection, row.id, tags=kept)
            return lookup.info(connection, self._scope, name)

        return self._transact(work)

    def delete(self, name: str, *, now: float) -> None:
        """Make ``name`` and its versions unknown; the name may be uploaded again.

        Nobody sees it any more, whoever it was shared with; a later upload is not shared.

        Raises:
            AdapterNotFound: no such name.
        """

        self._transact(lambda connection: placing.remove(connection, self._scope, name, now))

    def share(self, name: str, grantee: str | None) -> None:
        """Let ``grantee`` see ``name`` as ``owner/name``; nothing happens if it does already.

        Args:
            grantee: an owner, whether there is a key for it or not; None is everybody.

        Raises:
            AdapterNotFound: no such name.
            AdapterRejected: ``grantee`` cannot be an owner or is this one, or ``name`` is shared
                with ``GRANTEES_MAX`` others, or has no owner that it could be referred to by.
        """
        whom = sharing.grantee_of(grantee)
        validate_owner(self._scope.owner)
        if whom == self._scope.owner:
            raise AdapterRejected(f"grantee {whom!r}", "must be another than the owner")

        def work(connection: Connection) -> None:
            sharing.share(connection, placing.live_row(connection, self._scope, name), whom)

        self._transact(work)

    def unshare(self, name: str, grantee: str | None) -> None:
        """Undo ``share`` with the same ``grantee``; nothing happens if there was none.

        Raises:
            AdapterNotFound: no such name.
            AdapterRejected: ``grantee`` cannot be an owner.
        """
        whom = sharing.grantee_of(grantee)

        def work(connection: Connection) -> None:
            sharing.unshare(connection, placing.live_row(connection, self._scope, name), whom)

        self._transact(work)

    def grantees(self, name: str) -> list[str | None]:
        """With whom ``name`` is shared, sorted; None, which comes first, is everybody.

        Raises:
            AdapterNotFound: no such name.
        """
        with self._database.read() as connection:
            row = placing.live_row(connection, self._scope, name)
            return sharing.grantees(connection, row)

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
        return lookup.count(self._database, self._scope)

    def check(self) -> None:
        """Assert what must hold for every adapter in the database. O(versions); for tests."""
        checking.check(self._database)

    def _transact(self, work: Callable[[Connection], T]) -> T:
        try:
            return self._database.transact(work)
        except IntegrityError as error:
            raise AdapterConflict("another change of this adapter came first; try again") from error
