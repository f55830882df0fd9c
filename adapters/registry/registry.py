"""The registry: the catalog and the store as one durable thing.

Owns the order of writes: bytes first, then the name. A crash between the two leaves bytes that no
name refers to, never a name without bytes. Knows nothing of tensors.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile

from shoal.adapters.errors import AdapterConflict, AdapterNotFound
from shoal.adapters.registry.catalog import AdapterInfo, Catalog, Content
from shoal.adapters.registry.database import Database, sqlite_file
from shoal.adapters.registry.keys import Keys, Limits
from shoal.adapters.registry.names import SHIPPED_OWNER, not_found, validate_name
from shoal.adapters.registry.recent import RecentMeanings
from shoal.adapters.registry.store import Store, open_store, places
from shoal.adapters.registry.usage import UseRecorder

# Longer than any upload or request takes, and than hosts' clocks differ.
GRACE_S = 24 * 3600.0

_VERSION = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True)
class Address:
    """How another process opens the same registry."""

    registry_url: str
    store_url: str
    base_digest: str
    reserved_names: frozenset[str]

    @property
    def reachable(self) -> bool:
        """Whether another process can: not of a database or a store in this one's memory."""
        # fsspec's filesystems may stand on one another.
        if any(part.startswith("memory:") for part in self.store_url.split("::")):
            return False
        backend = self.registry_url.partition(":")[0].partition("+")[0]
        return backend != "sqlite" or sqlite_file(self.registry_url) is not None

    def open(self) -> "Registry":
        """Raises as ``Registry.open``."""
        return Registry.open(
            self.registry_url,
            self.store_url,
            base_digest=self.base_digest,
            reserved_names=self.reserved_names,
        )


class Registry:
    """Durable adapters of one base, by owner, name and version; thread-safe.

    Several processes may open one registry; each sees the others' changes at once. Methods that
    take an ``owner`` do what that owner may do and see, and no more; '' is the only owner while
    there are no keys. What names and references mean is said in ``catalog.Catalog``.

    Args:
        database, store: where it lives; ``close`` closes the database.
        base_digest: digest of the open base.
        reserved_names: names that no adapter may have, such as the base's.
        clock: unix time in seconds.
    """

    def __init__(
        self,
        database: Database,
        store: Store,
        *,
        base_digest: str,
        reserved_names: frozenset[str] = frozenset(),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._store = store
        self._base_digest = base_digest
        self._reserved_names = reserved_names
        self._clock = clock
        self._uses = UseRecorder(database, clock=clock)
        self._keys = Keys(database, clock=clock)
        self._recent = RecentMeanings()

    @classmethod
    def open(
        cls,
        registry_url: str,
        store_url: str | None = None,
        *,
        base_digest: str,
        reserved_names: frozenset[str] = frozenset(),
    ) -> "Registry":
        """Open or create a registry.

        Args:
            registry_url: SQLAlchemy URL of the catalog.
            store_url: fsspec URL of the store; None is the default of ``store.places``.

        Raises:
            RegistryUnavailable, SchemaTooNew: it cannot be opened.
        """
        store = open_store(store_url or places(registry_url).store_url)
        return cls(
            Database(registry_url), store, base_digest=base_digest, reserved_names=reserved_names
        )

    def claim(
        self,
        name: str,
        *,
        owner: str = "",
        content: Content | None = None,
        limits: Limits | None = None,
    ) -> None:
        """Check that ``name`` may be uploaded; changes nothing. See ``Catalog.claim``.

        Raises:
            AdapterNameInvalid, AdapterConflict, AdapterQuotaExceeded: it may not.
        """
        self._check_name(name)
        self._of(owner).claim(name, content=content, limits=limits)

    def publish(
        self,
        name: str,
        content: Content,
        record: bytes,
        *,
        owner: str = "",
        limits: Limits | None = None,
        claimed: bool = False,
    ) -> AdapterInfo:
        """Make ``record`` the active version of ``name``: durable when this returns.

        A record that ``name`` already has is made active as the version it is.

        Args:
            limits: of adapters and bytes that the owner may have; None is no limit.
            claimed: the caller has just asked ``claim`` the same.

        Raises:
            AdapterNameInvalid, AdapterConflict: ``name`` cannot be used; nothing has changed.
            AdapterQuotaExceeded: there is no room within ``limits``; nothing has changed.
            RegistryUnavailable: nothing has changed, unless the connection was lost while
                committing. Publishing the same again is harmless.
        """
        # With its limits, so that what there is no room for is not written either.
        if not claimed:
            self.claim(name, owner=owner, content=content, limits=limits)
        self.store(content.digest, record)
        return self.publish_stored(name, content, owner=owner, limits=limits)

    def store(self, digest: str, record: bytes) -> None:
        """Keep ``record`` for the ``publish_stored`` that follows."""
        # First, so that bytes which are there already stay until the name exists.
        self._of("").spare(digest, now=self._clock())
        self._store.put(digest, record)

    def publish_stored(
        self,
        name: str,
        content: Content,
        *,
        owner: str = "",
        limits: Limits | None = None,
        before_commit: Callable[[], None] | None = None,
    ) -> AdapterInfo:
        """As ``publish``, of a record that ``store`` has just kept.

        Args:
            before_commit: called when all is done but that; what it raises is passed on, and
                nothing has changed.
        """
        with self._recent.changing(owner, name):
            return self._of(owner).publish(
                name, content, created=self._clock(), limits=limits, before_commit=before_commit
            )

    @contextmanager
    def published_elsewhere(self, name: str, *, owner: str = "") -> Iterator[None]:
        """Another process changes ``name`` for this one in the block."""
        with self._database.lent(), self._recent.changing(owner, name):
            yield

    def publish_shipped(self, name: str, content: Content, record: bytes) -> AdapterInfo | None:
        """Like ``publish``, unless a user changed or deleted ``name``: then None.

        Also as ``shoal/name``, which everybody sees: who has a key does not see the bare one.
        """
        self._check_name(name)
        self.store(content.digest, record)
        shared = self._of(SHIPPED_OWNER)
        with self._recent.changing(SHIPPED_OWNER, name):
            shared.publish_shipped(name, content, created=self._clock())
        with suppress(AdapterNotFound):  # an admin may have deleted it
            shared.share(name, None)
        with self._recent.changing("", name):
            return self._of("").publish_shipped(name, content, created=self._clock())

    def read(self, digest: str) -> bytes:
        """The record of ``digest``, verified.

        Raises:
            RecordDamaged, RegistryUnavailable: it cannot be had.
        """
        return self._store.get(digest)

    def resolve(self, model: str, *, owner: str = "") -> AdapterInfo:
        """What ``name`` (its active version) or ``name@version`` means to ``owner``.

        Each may be ``owner/name`` for an adapter that its owner has shared. While the database
        cannot be reached it is what it meant lately: see ``recent.py``.

        Raises:
            AdapterNotFound: nothing; also when ``model`` could not be an adapter's name.
            RegistryUnavailable: the database cannot be reached, and this was not asked lately.
        """
        return self._recent.look_up(owner, model, lambda: self._look_up(model, owner))

    def _look_up(self, model: str, owner: str) -> AdapterInfo:
        name, at, number = model.partition("@")
        if not at:
            return self._of(owner).get(name)
        if _VERSION.fullmatch(number) is None:
            raise not_found(model)
        return self._of(owner).get(name, int(number))

    def page(
        self, *, limit: int, after: str | None = None, prefix: str = "", owner: str = ""
    ) -> tuple[list[AdapterInfo], str | None]:
        """See ``Catalog.page``."""
        return self._of(owner).page(limit=limit, after=after, prefix=prefix)

    def shared_page(
        self, *, limit: int, after: str | None = None, owner: str = ""
    ) -> tuple[list[AdapterInfo], str | None]:
        """See ``Catalog.shared_page``."""
        return self._of(owner).shared_page(limit=limit, after=after)

    def versions(self, name: str, *, owner: str = "") -> list[AdapterInfo]:
        """Every version of ``name``, oldest first, or AdapterNotFound."""
        return self._of(owner).versions(name)

    def activate(self, name: str, version: int, *, owner: str = "") -> AdapterInfo:
        """Let ``name`` mean ``version``, or AdapterNotFound."""
        with self._recent.changing(owner, name):
            return self._of(owner).activate(name, version)

    def tag(self, name: str, tags: Mapping[str, str], *, owner: str = "") -> AdapterInfo:
        """See ``Catalog.tag``."""
        with self._recent.changing(owner, name):
            return self._of(owner).tag(name, tags)

    def share(self, name: str, grantee: str | None, *, owner: str) -> None:
        """See ``Catalog.share``."""
        self._of(owner).share(name, grantee)

    def unshare(self, name: str, grantee: str | None, *, owner: str) -> None:
        """See ``Catalog.unshare``."""
        with self._recent.changing(owner, name):
            self._of(owner).unshare(name, grantee)

    def grantees(self, name: str, *, owner: str) -> list[str | None]:
        """See ``Catalog.grantees``."""
        return self._of(owner).grantees(name)

    def delete(self, name: str, *, owner: str = "") -> None:
        """Forget ``name``, or AdapterNotFound. Its version numbers are not used again.

        The bytes stay until ``collect``, because requests may be running with them.
        """
        with self._recent.changing(owner, name):
            self._of(owner).delete(name, now=self._clock())

    def note_use(self, info: AdapterInfo) -> None:
        """The adapter is being used. Does not wait for the database, and never fails."""
        self._uses.note(info.owner, info.name)

    def collect(
        self, *, grace_s: float = GRACE_S, stopping: Callable[[], bool] = lambda: False
    ) -> int:
        """Remove the bytes that nobody has referred to for ``grace_s``.

        Safe while others upload, delete and collect.

        Args:
            stopping: asked before each record; the rest is left when it says so.

        Returns:
            How many records were removed.
        """
        older_than = self._clock() - grace_s
        catalog = self._of("")  # garbage is nobody's
        removed = 0
        while True:
            digests = catalog.collectable(older_than)
            # Also of none: it forgets what turned out to be somebody else's, too.
            now_removed = catalog.forget(
                takewhile(lambda _: not stopping(), digests),
                older_than=older_than,
                remove_bytes=self._store.delete,
            )
            removed += now_removed
            if now_removed == 0 or stopping():
                return removed  # nothing is left, or another process collects the same ones

    def count(self, *, owner: str = "") -> int:
        """How many names ``owner`` has."""
        return self._of(owner).count()

    @property
    def keys(self) -> Keys:
        """The API keys of those who work with the adapters."""
        return self._keys

    def check(self) -> None:
        """See ``Catalog.check``."""
        self._of("").check()

    def close(self) -> None:
        """Write what is still to be written and close the database."""
        self._uses.close()
        self._database.close()

    def _of(self, owner: str) -> Catalog:
        return Catalog(self._database, base_digest=self._base_digest, owner=owner)

    def _check_name(self, name: str) -> None:
        validate_name(name)
        if name in self._reserved_names:
            raise AdapterConflict(f"adapter name {name!r} is reserved: it names the base model")
