"""``shoal adapters list|show|activate|rm --registry URL``: an operator's view, without a server.

Of all owners (``owner/name``) and bases. Servers on that registry see changes with the next
request. Uploading is not among them: it takes the base's weights to check an adapter.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.adapters.registry.catalog import AdapterInfo
    from shoal.adapters.registry.whole import WholeCatalog


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What makes a verb work on a registry."""
    parser.add_argument(
        "--registry", metavar="URL", help="work on this registry itself: no server is asked"
    )


def run(args: argparse.Namespace) -> int:
    """Carry out ``args.adapters_verb``; returns the exit status."""
    from shoal.adapters.errors import AdapterError
    from shoal.adapters.registry.database import Database, sqlite_file
    from shoal.adapters.registry.errors import RegistryError
    from shoal.adapters.registry.whole import WholeCatalog

    if getattr(args, "shared", False):
        print("error: --shared is of a key's owner: with --registry everything is", file=sys.stderr)
        return 2
    try:
        file = sqlite_file(args.registry)
        if file is not None and not file.exists():  # opening would make one
            print(f"error: no registry at {file}", file=sys.stderr)
            return 1
        database = Database(args.registry)
        try:
            _VERBS[args.adapters_verb](WholeCatalog(database), args)
        finally:
            database.close()
    except BrokenPipeError:  # `… list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (AdapterError, RegistryError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0


def line(adapter: dict[str, Any], mark: str = "", base: str = "") -> str:
    """One version for people.

    Args:
        adapter: as ``GET /v1/adapters`` describes it.
        base: digest of its base, shown when given.
    """
    created = adapter.get("created")
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(created)) if created else ""
    return (
        f"{mark}{adapter['name']}@{adapter['version']}  {adapter['family']} "
        f"r={adapter['rank']}  {adapter['bytes']} bytes  {adapter['digest'][:12]}  "
        + "  ".join(filter(None, (base and f"base {base[:12]}", when)))
    ).rstrip()


def _list(catalog: "WholeCatalog", args: argparse.Namespace) -> None:
    several = len(catalog.bases()) > 1
    found = False
    for base_digest, info in catalog.all(prefix=args.prefix, owner=args.owner):
        found = True
        print(line(_as_json(info), base=base_digest if several else ""))
    if not found:
        print("no adapters", file=sys.stderr)


def _show(catalog: "WholeCatalog", args: argparse.Namespace) -> None:
    for info in catalog.versions(args.name):
        print(line(_as_json(info), mark="*" if info.active else " "))


def _activate(catalog: "WholeCatalog", args: argparse.Namespace) -> None:
    print(line(_as_json(catalog.activate(args.name, args.version))))


def _rm(catalog: "WholeCatalog", args: argparse.Namespace) -> None:
    catalog.delete(args.name, now=time.time())
    print(f"deleted {args.name}")


_VERBS: dict[str, Callable[["WholeCatalog", argparse.Namespace], None]] = {
    "list": _list,
    "show": _show,
    "activate": _activate,
    "rm": _rm,
}


def _as_json(info: "AdapterInfo") -> dict[str, Any]:
    fields = ("version", "family", "rank", "bytes", "digest", "created")
    return {"name": info.reference, **{name: getattr(info, name) for name in fields}}
