"""``shoal adapters ...``: manage the adapters of a running server over HTTP.

``check`` and ``convert`` work on files; ``export`` and ``import`` on a registry, as do all the
others when given ``--registry``. They need no server: see their modules.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import httpx

from shoal.adapters.spec import ADAPTER_NAME
from shoal.server.cli import (
    adapters_archive,
    adapters_base,
    adapters_check,
    adapters_convert,
    adapters_registry,
)

FILES = ("adapter_config.json", "adapter_model.safetensors")
KEY_VARIABLE = "SHOAL_API_KEY"
OFFLINE = {"check": adapters_check, "convert": adapters_convert}
ARCHIVE = {"export": adapters_archive.run_export, "import": adapters_archive.run_import}


class CommandError(Exception):
    """The command cannot be carried out; the text says why and what to do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    connection = argparse.ArgumentParser(add_help=False)
    connection.add_argument(
        "--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)"
    )
    connection.add_argument(
        "--api-key", help=f"bearer token (default: ${KEY_VARIABLE})", metavar="KEY"
    )
    verbs = parser.add_subparsers(dest="adapters_verb", required=True)

    registry = argparse.ArgumentParser(add_help=False)
    adapters_registry.add_arguments(registry)

    def verb(name: str, help: str, *more: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=help, description=help, parents=[connection, *more])

    listing = verb("list", "list active adapters", registry)
    listing.add_argument("--prefix", default="", help="names that begin so")
    listing.add_argument("--shared", action="store_true", help="what others share with you")
    listing.add_argument("--owner", help="of this owner, with an admin key or --registry")
    push = verb("push", "upload an adapter directory; usable by the next request")
    push.add_argument("name", help="name to serve it under")
    push.add_argument("directory", type=Path, help=f"folder with {' and '.join(FILES)}")
    adapters_base.add_arguments(push)  # for a registry without a server
    verb("show", "show one adapter and its versions", registry).add_argument("name")
    activate = verb("activate", "make a version the one that the bare name means", registry)
    activate.add_argument("name")
    activate.add_argument("version", type=int)
    verb("rm", "delete an adapter (its name stops resolving)", registry).add_argument("name")
    tag = verb(
        "tag", "give an adapter these tags and no others; without any, take them away", registry
    )
    tag.add_argument("name")
    tag.add_argument("tags", nargs="*", metavar="KEY=VALUE")
    for name, help in (
        ("share", "let another owner use an adapter, as YOU/NAME; without one, say who may"),
        ("unshare", "undo share"),
    ):
        shares = verb(name, help, registry)
        shares.add_argument("name")
        shares.add_argument(
            "owner", nargs="?" if name == "share" else None, help="* is everybody", metavar="OWNER"
        )
    for name, module in OFFLINE.items():
        module.add_arguments(verbs.add_parser(name, help=module.HELP, description=module.HELP))
    for name, help, add in (
        ("export", adapters_archive.EXPORT_HELP, adapters_archive.add_export_arguments),
        ("import", adapters_archive.IMPORT_HELP, adapters_archive.add_import_arguments),
    ):
        add(verbs.add_parser(name, help=help, description=help))


def run(args: argparse.Namespace) -> int:
    if args.adapters_verb == "tag":
        pairs = [tag.partition("=") for tag in args.tags]
        if wrong := [key for key, equals, _ in pairs if not equals]:
            print(f"error: {wrong[0]!r} is no tag: write KEY=VALUE", file=sys.stderr)
            return 1
        args.tags = {key: value for key, _, value in pairs}
    if args.adapters_verb in OFFLINE:
        return int(OFFLINE[args.adapters_verb].run(args))
    if args.adapters_verb in ARCHIVE:
        return ARCHIVE[args.adapters_verb](args)
    if getattr(args, "registry", None) is not None:
        return adapters_registry.run(args)
    key = args.api_key or os.environ.get(KEY_VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(base_url=args.url, headers=headers, timeout=120) as client:
            _VERBS[args.adapters_verb](client, args)
    except CommandError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    except httpx.HTTPError as problem:
        print(f"error: {args.url}: {problem}\nhint: is the server running?", file=sys.stderr)
        return 1
    return 0


def _list(client: httpx.Client, args: argparse.Namespace) -> None:
    query = {"prefix": args.prefix} if args.prefix else {}
    if args.shared:
        query["shared"] = "true"
    if args.owner is not None:
        query["owner"] = args.owner
    while True:
        page = _answer(client.get("/v1/adapters", params=query))
        for adapter in page["data"]:
            _print(adapter)
        if not page["data"] and "after" not in query:
            print("no adapters", file=sys.stderr)
        if not page.get("has_more"):
            return
        query["after"] = page["next"]


def _push(client: httpx.Client, args: argparse.Namespace) -> None:
    missing = [name for name in FILES if not (args.directory / name).is_file()]
    if missing:
        pickles = [*args.directory.glob("adapter_model.bin"), *args.directory.glob("*.pt")]
        hint = "\nhint: make it of the pickle with `shoal adapters convert`" if pickles else ""
        raise CommandError(f"{args.directory} has no {' and no '.join(missing)}{hint}")
    files = [("file", (name, (args.directory / name).read_bytes())) for name in FILES]
    _print(_answer(client.post("/v1/adapters", data={"name": args.name}, files=files)))


def _show(client: httpx.Client, args: argparse.Namespace) -> None:
    active = _answer(client.get(_path(args.name)))
    for version in _answer(client.get(f"{_path(args.name)}/versions"))["data"]:
        _print(version, mark="*" if version["version"] == active["version"] else " ")


def _activate(client: httpx.Client, args: argparse.Namespace) -> None:
    body = {"version": args.version}
    _print(_answer(client.post(f"{_path(args.name)}/activate", json=body)))


def _rm(client: httpx.Client, args: argparse.Namespace) -> None:
    _answer(client.delete(_path(args.name)))
    print(f"deleted {args.name}")


def _tag(client: httpx.Client, args: argparse.Namespace) -> None:
    shown = _answer(client.put(f"{_path(args.name)}/tags", json={"tags": args.tags}))["tags"]
    print(adapters_registry.tags_line(shown))


def _share(client: httpx.Client, args: argparse.Namespace) -> None:
    if args.owner is not None:
        _answer(client.put(_share_path(args)))
    owners = [share["owner"] for share in _answer(client.get(f"{_path(args.name)}/shares"))["data"]]
    print(adapters_registry.shares_line(args.name, owners))


def _unshare(client: httpx.Client, args: argparse.Namespace) -> None:
    _answer(client.delete(_share_path(args)))
    print(f"{args.name} is no longer shared with {args.owner}")


_VERBS = {
    "list": _list,
    "push": _push,
    "show": _show,
    "activate": _activate,
    "rm": _rm,
    "tag": _tag,
    "share": _share,
    "unshare": _unshare,
}


def _path(name: str) -> str:
    """Route of one adapter. Checked here, because ``../models`` would name another route."""
    for part in name.split("/", 1):
        if not ADAPTER_NAME.fullmatch(part):
            raise CommandError(
                f"{name!r} is no adapter name: it must match {ADAPTER_NAME.pattern}, and may have"
                " its owner's name and a / before it"
            )
    return f"/v1/adapters/{name}"


def _share_path(args: argparse.Namespace) -> str:
    if args.owner != "*" and not ADAPTER_NAME.fullmatch(args.owner):
        raise CommandError(f"{args.owner!r} is no owner: it must match {ADAPTER_NAME.pattern}")
    return f"{_path(args.name)}/shares/{args.owner}"


def _answer(response: httpx.Response) -> Any:
    if response.is_success:
        return response.json() if response.content else {}
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:300]
    raise CommandError(f"HTTP {response.status_code}: {message}")


def _print(adapter: dict[str, Any], mark: str = "") -> None:
    print(adapters_registry.line(adapter, mark))
