"""A registry that a command opens by URL, without a server: its database, store and bases."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.adapters.registry.database import Database
    from shoal.adapters.registry.store import Store


@dataclass(frozen=True, slots=True)
class RegistryParts:
    """An open registry of any base."""

    database: "Database"
    store: "Store"
    bases: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which registry."""
    parser.add_argument("--registry", metavar="URL", help="as for serve (default: the same)")
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
def open_parts(args: argparse.Namespace) -> Iterator[RegistryParts]:
    """Open, or create, what ``args`` of ``add_arguments`` name.

    Raises:
        RegistryError: it cannot be opened.
    """
    from shoal.adapters.registry.database import Database
    from shoal.adapters.registry.store import open_store, places
    from shoal.server.config import ServeConfig

    url = ServeConfig(registry=args.registry).registry_url
    where = places(url, args.store)
    database = Database(url)
    try:
        yield RegistryParts(database, open_store(where.store_url), where.bases)
    finally:
        database.close()
