"""``shoal bench serve``: the load test. The only module of the server that knows ``loadtests``."""

import argparse

from shoal.loadtests import run as serve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benches = parser.add_subparsers(dest="bench", required=True)
    serve.add_arguments(
        benches.add_parser(
            "serve",
            help="drive a running server with a seeded load",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
    )


def run(args: argparse.Namespace) -> int:
    return serve.run(args)
