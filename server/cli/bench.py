"""``shoal bench``: load tests and benchmarks; alone in the server it knows ``loadtests``.

``serve`` and ``pauses`` drive a running server over HTTP, for which ``prepare`` makes files where
there is no checkpoint; ``offline`` runs the engine in this process. ``registry`` looks up in a
registry that ``archive`` made the contents of.
"""

import argparse

from shoal.loadtests import archive, offline, pauses, prepare, registry
from shoal.loadtests import run as serve

BENCHES = {
    "serve": (serve, "drive a running server with a seeded load"),
    "pauses": (pauses, "watch a running server's streams while adapters are uploaded"),
    "prepare": (prepare, "write a model without weights, and adapters, for serve to measure"),
    "archive": (archive, "write random adapters of a real base, for `shoal adapters import`"),
    "registry": (registry, "measure look-ups in a registry, without a server"),
    "offline": (offline, "run the engine alone on a named shape with random weights"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benches = parser.add_subparsers(dest="bench", required=True)
    for name, (module, help) in BENCHES.items():
        module.add_arguments(
            benches.add_parser(
                name, help=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter
            )
        )


def run(args: argparse.Namespace) -> int:
    return int(BENCHES[args.bench][0].run(args))
