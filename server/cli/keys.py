"""``shoal keys ...``: the API keys of a registry, without a server.

Servers on the registry go by what is changed here within seconds. A secret is printed once, when
its key is made, alone on standard output: ``KEY=$(shoal keys create ...)``.
"""

import argparse
import re
import sys
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from shoal.server.cli import registry_parts
from shoal.server.config import parse_bytes

if TYPE_CHECKING:  # the database's library takes a while that `--help` should not
    from shoal.adapters.registry.keys import Key, Keys, Limits

ROLES = ("admin", "tenant", "read-only")
# Field of `Limits` -> what it limits.
LIMITS = {
    "requests_per_minute": "requests a minute, and at once after a pause",
    "tokens_per_minute": "tokens of prompts and answers a minute, and at once after a pause",
    "concurrent_requests": "requests that are not answered yet",
    "adapters": "names",
    "bytes": "size of all adapters together, such as 10GiB",
    "weight": "share of a busy server relative to others', from 1 (the default) to 1024",
}
_SECRET = re.compile(r"shoal_([0-9a-f]{16})_.*")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="keys_verb", required=True)

    def verb(name: str, help: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=help, description=help)
        registry_parts.add_registry_argument(added)
        return added

    create = verb("create", "make a key and print its secret, which cannot be had again")
    create.add_argument("--role", required=True, choices=ROLES, help="what it may do")
    create.add_argument("--owner", default="", help="whose adapters it works with")
    create.add_argument("--label", default="", help="what `list` shows it as")
    _add_limits(create)
    listed = verb("list", "list keys, revoked ones too; never their secrets")
    listed.add_argument("--owner", help="only this one's")
    verb("revoke", "let a key be refused, for good").add_argument("id", help="as `list` shows it")
    change = verb("change", "change the limits of a key; those not named stay as they are")
    change.add_argument("id", help="as `list` shows it")
    _add_limits(change)


def run(args: argparse.Namespace) -> int:
    from shoal.adapters.errors import AdapterRejected
    from shoal.adapters.registry.errors import KeyNotFound, RegistryError
    from shoal.adapters.registry.keys import Keys

    secret = _SECRET.fullmatch(getattr(args, "id", ""))
    if secret is not None:  # not to be repeated in a message
        print(f"error: that is a secret\nhint: its id is {secret[1]}", file=sys.stderr)
        return 2
    if args.keys_verb == "create" and not args.owner and args.role != "admin":
        print(
            f"error: a {args.role} key needs an owner\nhint: --owner NAME; adapters belong to it, "
            "and all of its keys see them",
            file=sys.stderr,
        )
        return 2
    if args.keys_verb == "change" and not _limits_of(args):
        flags = ", ".join(map(_flag, LIMITS))
        print(f"error: nothing to change\nhint: one of {flags}", file=sys.stderr)
        return 2
    try:
        create = args.keys_verb == "create"
        with registry_parts.open_database(args, create=create) as database:
            _VERBS[args.keys_verb](Keys(database), args)
    except KeyNotFound as problem:
        print(f"error: {problem}\nhint: `shoal keys list` shows them", file=sys.stderr)
        return 1
    except (AdapterRejected, RegistryError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0


def _create(keys: "Keys", args: argparse.Namespace) -> None:
    from shoal.adapters.registry.keys import Limits

    key, secret = keys.create(
        role=args.role,
        owner=args.owner,
        label=args.label,
        limits=replace(Limits(), **_limits_of(args)),
    )
    print(secret)
    print(
        f"created key {_named(key)}\n"
        "Its secret is the line above and is shown only now; send it as `Authorization: Bearer`.",
        file=sys.stderr,
    )


def _list(keys: "Keys", args: argparse.Namespace) -> None:
    page, after = keys.page(owner=args.owner)
    if not page:
        print("no keys", file=sys.stderr)
        return
    _print_row("ID", "ROLE", "CREATED", "REVOKED", "OWNER", "LABEL", "LIMITS")
    while True:
        for key in page:
            revoked = "-" if key.revoked is None else _when(key.revoked)
            limits, created = _shown(key.limits) or "-", _when(key.created)
            label = key.label or "-"
            _print_row(key.id, key.role, created, revoked, key.owner or "-", label, limits)
        if after is None:
            return
        page, after = keys.page(after=after, owner=args.owner)


def _revoke(keys: "Keys", args: argparse.Namespace) -> None:
    print(f"revoked key {_named(keys.revoke(args.id))}")


def _change(keys: "Keys", args: argparse.Namespace) -> None:
    limits = replace(keys.get(args.id).limits, **_limits_of(args))
    key = keys.change(args.id, limits=limits)
    print(f"key {_named(key)} now has {_shown(key.limits) or 'no limits'}")


_VERBS = {"create": _create, "list": _list, "revoke": _revoke, "change": _change}


def _add_limits(parser: argparse.ArgumentParser) -> None:
    limits = parser.add_argument_group("limits", "of the key's owner; `none` is no limit")
    parsers: dict[str, Any] = {"bytes": _bytes, "weight": int}
    for name, what in LIMITS.items():
        parse = parsers.get(name, _count)
        limits.add_argument(
            _flag(name), type=parse, help=what, metavar="N", default=argparse.SUPPRESS
        )


def _limits_of(args: argparse.Namespace) -> dict[str, Any]:
    """The limits that were given."""
    return {name: getattr(args, name) for name in LIMITS if hasattr(args, name)}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _count(text: str) -> int | None:
    if text == "none":
        return None
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a count from 0 nor `none`")
    return int(text)


def _bytes(text: str) -> int | None:
    try:
        return None if text == "none" else parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _named(key: "Key") -> str:
    return f"{key.id} ({key.role}{' of ' + key.owner if key.owner else ''})"


def _shown(limits: "Limits") -> str:
    shown = []
    for name, value in asdict(limits).items():
        if value is not None and (name, value) != ("weight", 1):
            shown.append(f"{name.replace('_', '-')}={_size(value) if name == 'bytes' else value}")
    return " ".join(shown)


def _size(count: int) -> str:
    """A byte count that ``parse_bytes`` reads back as it is."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count and count % (1 << power) == 0:
            return f"{count >> power}{unit}"
    return str(count)


def _when(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_s))


def _print_row(*cells: str) -> None:
    # What varies in width comes last, so that a page can be printed before the next is read.
    widths = (16, 9, 16, 16, 16, 20, 0)
    print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
