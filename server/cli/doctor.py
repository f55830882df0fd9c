"""``shoal doctor``: whether everything that a registry's catalog promises is in its store.

Works on the registry itself; a server may be running on it. Ends with 1 when an adapter cannot be
served, or when there is something to repair and ``--repair`` was not given.
"""

import argparse
import sys

from tqdm import tqdm

from shoal.server.cli import registry_parts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    registry_parts.add_arguments(parser)
    parser.add_argument(
        "--repair",
        action="store_true",
        help="remove orphans and what is unreadable; never what an adapter refers to",
    )
    parser.add_argument(
        "--quick", action="store_true", help="only look whether records are there; read none"
    )
    parser.add_argument(
        "--grace-hours",
        type=float,
        default=24.0,
        help="spare what is younger, such as uploads in progress (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    from shoal.adapters.registry.doctor import examine
    from shoal.adapters.registry.errors import RegistryError

    if not args.grace_hours >= 0:
        print(f"error: --grace-hours {args.grace_hours} must not be negative", file=sys.stderr)
        return 2
    try:
        with (
            registry_parts.open_parts(args, create=False) as parts,
            tqdm(unit="", unit_scale=True, disable=None) as bar,
        ):

            def progress(what: str, done: int) -> None:
                bar.set_description(what, refresh=False)
                bar.update(done - bar.n)

            report = examine(
                parts.database,
                parts.store,
                parts.bases.folder,
                repair=args.repair,
                read_all=not args.quick,
                grace_s=args.grace_hours * 3600,
                progress=progress,
            )
    except (RegistryError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    again = "upload the same content again, or import it with --mend"
    bases = "import them with --mend, or upload an adapter with its basis"
    findings = (
        ("missing", report.missing, again),
        ("damaged", report.damaged, again),
        ("missing bases", report.missing_bases, bases),
        ("orphans", report.orphans, "--repair removes them"),
        ("leftovers", report.leftovers, "--repair removes them"),
        ("torn packs", report.torn_packs, "--repair keeps what is whole"),
        ("dead packs", report.dead_packs, "--repair removes what is dead"),
    )
    print(f"{report.records} records are referred to")
    for name, finding, hint in findings:
        if finding.count:
            print(f"{finding.count} {name}  ({hint})")
            for example in finding.examples:
                print(f"  {example}")
    if args.repair:
        print(
            f"removed {report.removed_records} records, {report.removed_leftovers} leftovers and "
            f"{report.removed_packs} packs, {report.rescued} records of which live on in others"
        )
    left = 0 if args.repair else sum(finding.count for _, finding, _ in findings[3:])
    return 0 if report.healthy and not left else 1
