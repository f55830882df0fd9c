"""What an operator sees of a catalog: the adapters of every owner and every base.

A server is of one base, and a request of one owner; whoever holds the database's URL is neither.
A *reference* is ``name``, for those without an owner, or ``owner/name``. Names are unique for each
owner, whatever the base, so a reference says which base it is of.
"""

from collections.abc import Iterator, Mapping

from sqlalchemy import select

from shoal.adapters.registry.catalog import PAGE_MAX, AdapterInfo, Catalog
from shoal.adapters.registry.database import Database
from shoal.adapters.registry.names import not_found, split_reference
from shoal.adapters.registry.tables import ADAPTERS, TOTALS


class WholeCatalog:
    """A registry's names and versions, for the command line; thread-safe.

    Every method may raise RegistryUnavailable.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def bases(self) -> set[str]:
        """Digests of the bases that have adapters."""
        query = select(TOTALS.c.base_digest).where(TOTALS.c.names > 0)
        with self._database.read() as connection:
            return set(connection.execute(query).scalars())

    def all(
        self, *, prefix: str = "", owner: str | None = None
    ) -> Iterator[tuple[str, AdapterInfo]]:
        """Base digest and active version of every adapter, by base, owner and name.

        Args:
            prefix: only names that begin so, whoever owns them.
            owner: only this one's; None is everybody's.
        """
        query = select(TOTALS.c.base_digest, TOTALS.c.owner).where(TOTALS.c.names > 0)
        if owner is not None:
            query = query.where(TOTALS.c.owner == owner)
        with self._database.read() as connection:
            groups = connection.execute(query.order_by(*query.selected_columns)).all()
        for base_digest, whose in groups:
            catalog = Catalog(self._database, base_digest=base_digest, owner=whose)
            after: str | None = None
            while True:
                infos, after = catalog.page(limit=PAGE_MAX, after=after, prefix=prefix)
                for info in infos:
                    yield base_digest, info
                if after is None:
                    break

    def versions(self, reference: str) -> list[AdapterInfo]:
        """Every version of an adapter, oldest first, or AdapterNotFound."""
        catalog, name = self._find(reference)
        return catalog.versions(name)

    def activate(self, reference: str, version: int) -> AdapterInfo:
        """Let the bare name mean ``version``, or AdapterNotFound."""
        catalog, name = self._find(reference)
        return catalog.activate(name, version)

    def tag(self, reference: str, tags: Mapping[str, str]) -> AdapterInfo:
        """Give an adapter these tags and no others, or AdapterNotFound, AdapterRejected."""
        catalog, name = self._find(reference)
        return catalog.tag(name, tags)

    def share(self, reference: str, grantee: str | None) -> None:
        """Let ``grantee``, or everybody, see an adapter, or AdapterNotFound, AdapterRejected."""
        catalog, name = self._find(reference)
        catalog.share(name, grantee)

    def unshare(self, reference: str, grantee: str | None) -> None:
        """Undo ``share``, or AdapterNotFound, AdapterRejected."""
        catalog, name = self._find(reference)
        catalog.unshare(name, grantee)

    def grantees(self, reference: str) -> list[str | None]:
        """With whom an adapter is shared; None is everybody. AdapterNotFound."""
        catalog, name = self._find(reference)
        return catalog.grantees(name)

    def delete(self, reference: str, *, now: float) -> None:
        """Forget an adapter as its owner's ``delete`` does, or AdapterNotFound.

        Args:
            now: unix time.
        """
        catalog, name = self._find(reference)
        catalog.delete(name, now=now)

    def _find(self, reference: str) -> tuple[Catalog, str]:
        """The catalog in which its owner sees it, and its name there."""
        found = split_reference(reference, "")
        if found is None:
            raise not_found(reference)
        owner, name = found
        query = select(ADAPTERS.c.base_digest).where(
            ADAPTERS.c.owner == owner, ADAPTERS.c.name == name, ADAPTERS.c.deleted_at.is_(None)
        )
        with self._database.read() as connection:
            base_digest = connection.execute(query).scalar_one_or_none()
        if base_digest is None:
            raise not_found(reference)
        return Catalog(self._database, base_digest=base_digest, owner=owner), name
