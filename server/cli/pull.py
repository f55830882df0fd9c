"""``shoal pull NAME``: fetch a base model known by name into the user's cache."""

import argparse
import sys

from shoal.server.model.config import ModelError
from shoal.server.model.pull import pull_smollm2

MODELS = {"smollm2": pull_smollm2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=sorted(MODELS), help="which model")


def run(args: argparse.Namespace) -> int:
    try:
        print(MODELS[args.name]())
    except ModelError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0
