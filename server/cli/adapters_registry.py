"""``shoal adapters VERB --registry URL``: an operator's view of a registry, without a server.

Of all owners (``owner/name``) and bases. Servers on that registry see changes with the next
request. ``push`` checks an adapter as a server does, for which it opens the base.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shoal.server.cli import adapters_base

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
    from shoal.server.model.config import ModelError

    if getattr(args, "shared", False):
        print("error: --shared is of a key's owner: with --registry everything is", file=sys.stderr)
        return 2
    try:
        if args.adapters_verb == "push":
            return _push(args)
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
    except (AdapterError, RegistryError, ModelError, OSError) as problem:
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


def _tag(catalog: "WholeCatalog", args: argparse.Namespace) -> None:
    print(tags_line(catalog.tag(args.name, args.tags).tags))


def _share(catalog: "WholeCatalog", args: argparse.Namespace) -> None:
    if args.owner is not None:
        catalog.share(args.name, _grantee(args.owner))
    print(shares_line(args.name, [who or "*" for who in catalog.grantees(args.name)]))


def _unshare(catalog: "WholeCatalog", args: argparse.Namespace) -> None:
    catalog.unshare(args.name, _grantee(args.owner))
    print(f"{args.name} is no longer shared with {args.owner}")


def tags_line(tags: Mapping[str, str]) -> str:
    """Tags for people."""
    return " ".join(f"{key}={value}" for key, value in tags.items()) or "no tags"


def shares_line(name: str, owners: Sequence[str]) -> str:
    """With whom ``name`` is shared, for people."""
    return f"{name} is shared with " + (", ".join(owners) or "nobody")


def _grantee(owner: str) -> str | None:
    return None if owner == "*" else owner


def _push(args: argparse.Namespace) -> int:
    """Upload as a server does, but for what only a device can refuse."""
    import torch

    from shoal.adapters.basis import BasisStore
    from shoal.adapters.host_tier import HostTier
    from shoal.adapters.library import AdapterLibrary, places
    from shoal.adapters.reading import adapter_files
    from shoal.adapters.registry.names import validate_name, validate_owner
    from shoal.adapters.registry.shared_bases import SharedBases
    from shoal.server.config import ServeConfig

    whose, slash, name = args.name.rpartition("/")
    owner = validate_owner(whose) if slash else ""
    validate_name(name)
    files = adapter_files(args.directory)
    look = adapters_base.look_at(files)
    limits = ServeConfig(model=args.base)
    shared = SharedBases.open(places(args.registry, args.store))
    with adapters_base.offline_base(args, need_basis=True, need_spectral=look.spectral) as base:
        library = AdapterLibrary.open(
            registry_url=args.registry,
            store_url=args.store,
            shape=base.shape,
            weight_of=base.weight_of,
            canonical=base.canonical,
            bases=BasisStore(shared.folder, shared),
            host=HostTier(limits.host_adapter_memory),
            on_basis=lambda basis: None,
            dtype=torch.float32,
            reserved_names=frozenset({limits.base_name.lower()}),
            max_upload_bytes=limits.max_upload_bytes,
            shipped=None,
            spectral=base.spectral,
            on_spectral=lambda basis, targets: None,
        )
        try:
            print(line(_as_json(library.upload(name, files, owner=owner))))
        finally:
            library.close()
    return 0


_VERBS: dict[str, Callable[["WholeCatalog", argparse.Namespace], None]] = {
    "list": _list,
    "show": _show,
    "activate": _activate,
    "rm": _rm,
    "tag": _tag,
    "share": _share,
    "unshare": _unshare,
}


def _as_json(info: "AdapterInfo") -> dict[str, Any]:
    fields = ("version", "family", "rank", "bytes", "digest", "created")
    return {"name": info.reference, **{name: getattr(info, name) for name in fields}}
