"""A registry that a command opens by URL, without a server: its database, store and bases."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.adapters.registry.database import Database
    from shoal.adapters.registry.shared_bases import SharedBases
    from shoal.adapters.registry.store import Store


@dataclass(frozen=True, slots=True)
class RegistryParts:
    """An open registry of any base."""

    database: "Database"
    store: "Store"
    bases: "SharedBases"


def add_registry_argument(parser: argparse.ArgumentParser) -> None:
    """Which registry, for a command that needs no stored bytes."""
    parser.add_argument("--registry", metavar="URL", help="as for serve (default: the same)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which registry."""
    add_registry_argument(parser)
    parser.add_argument("--store", metavar="URL", help="as for serve (default: the same)")


def urls(args: argparse.Namespace) -> tuple[str, str]:
    """The catalog and the store that ``args`` of ``add_arguments`` name.

    Raises:
        RegistryUnavailable: there is no default store for that catalog.
    """
    from shoal.adapters.registry.store import places
    from shoal.server.config import ServeConfig

    url = ServeConfig(registry=args.registry).registry_url
    return url, places(url, args.store).store_url


@contextmanager
def open_database(args: argparse.Namespace, *, create: bool = True) -> "Iterator[Database]":
    """Open, or create, the database that ``args`` of ``add_registry_argument`` name.

    Args:
        create: make a SQLite file that is not there. A mistyped name is else a registry of nothing,
            in which all is well.

    Raises:
        RegistryError: it cannot be opened.
    """
    from shoal.adapters.registry.database import Database, sqlite_file
    from shoal.adapters.registry.errors import RegistryUnavailable
    from shoal.server.config import ServeConfig

    url = ServeConfig(registry=args.registry).registry_url
    file = sqlite_file(url)
    if not create and file is not None and not file.exists():
        raise RegistryUnavailable(f"no registry at {file}")
    database = Database(url)
    try:
        yield database
    finally:
        database.close()


@contextmanager
def open_parts(args: argparse.Namespace, *, create: bool = True) -> Iterator[RegistryParts]:
    """Open, or create, what ``args`` of ``add_arguments`` name; ``create`` as above.

    Raises:
        RegistryError: it cannot be opened.
    """
    from shoal.adapters.registry.shared_bases import SharedBases
    from shoal.adapters.registry.store import open_store, places
    from shoal.server.config import ServeConfig

    where = places(ServeConfig(registry=args.registry).registry_url, args.store)
    with open_database(args, create=create) as database:
        yield RegistryParts(database, open_store(where.store_url), SharedBases.open(where))
