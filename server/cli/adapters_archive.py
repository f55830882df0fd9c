"""``shoal adapters export|import``: a registry's adapters as one tar stream, without a server.

A server may be running on the registry meanwhile: it sees imported adapters as it sees uploads.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from shoal.server.cli import registry_parts

EXPORT_HELP = "write all adapters of a registry to a tar file, as a backup or to move them"
IMPORT_HELP = "publish the adapters of an exported tar file; run it again if it was stopped"


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="where to; - is standard output")
    registry_parts.add_arguments(parser)


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="what export wrote, compressed or not; - is standard input")
    registry_parts.add_arguments(parser)
    parser.add_argument(
        "--mend",
        action="store_true",
        help="also read what is there already, and write what is missing or damaged of it anew",
    )


def run_export(args: argparse.Namespace) -> int:
    return _reported(lambda: _export(args))


def run_import(args: argparse.Namespace) -> int:
    return _reported(lambda: _import(args))


def _export(args: argparse.Namespace) -> int:
    from shoal.adapters.registry.archive import export_archive

    with (
        registry_parts.open_parts(args, create=False) as parts,
        _progress("exporting") as progress,
    ):
        bases = parts.bases.folder
        if args.file == "-":
            out = sys.stdout.buffer
            got = export_archive(parts.database, parts.store, bases, out, progress=progress)
            out.flush()
        else:
            with Path(args.file).open("xb") as file:
                got = export_archive(parts.database, parts.store, bases, file, progress=progress)
    print(f"exported {got.adapters} adapters", file=sys.stderr)
    if got.left_out:
        print(
            f"error: {got.left_out} adapters were left out, their bytes are missing or damaged\n"
            "hint: `shoal doctor` names them",
            file=sys.stderr,
        )
    return 1 if got.left_out else 0


def _import(args: argparse.Namespace) -> int:
    from shoal.adapters.registry.archive import import_archive

    with (
        registry_parts.open_parts(args) as parts,
        _source(args.file) as source,
        _progress("importing") as progress,
    ):
        got = import_archive(
            parts.database,
            parts.store,
            parts.bases.folder,
            source,
            on_base=parts.bases.send,
            mend=args.mend,
            progress=progress,
        )
    print(
        f"imported {got.added} new names and {got.updated} new versions; "
        f"{got.unchanged} were there already",
        file=sys.stderr,
    )
    if args.mend:
        print(f"mended {got.mended} records", file=sys.stderr)
    if got.refused:
        print(f"error: {got.refused} names belong to adapters of another base", file=sys.stderr)
    return 1 if got.refused else 0


@contextmanager
def _source(name: str) -> Iterator[BinaryIO]:
    if name == "-":
        yield sys.stdin.buffer
    else:
        with Path(name).open("rb") as file:
            yield file


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int | None], None]]:
    with tqdm(desc=what, unit=" adapters", unit_scale=True, disable=None) as bar:

        def show(done: int, of: int | None) -> None:
            bar.total = of
            bar.update(done - bar.n)

        yield show


def _reported(work: Callable[[], int]) -> int:
    from shoal.adapters.errors import AdapterError
    from shoal.adapters.registry.errors import RegistryError

    try:
        return work()
    except (AdapterError, RegistryError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
