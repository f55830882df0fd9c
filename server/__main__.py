"""The ``shoal`` command: one verb, one module in ``cli/``.

A verb's module is imported only when the verb is used, so that ``shoal --help`` and ``shoal bench
serve`` do not wait for torch. Each module has ``HELP``, ``add_arguments(parser)`` and
``run(args) -> exit code``.
"""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

import shoal

VERBS = {
    "serve": "serve a base model and its adapters over an OpenAI-style endpoint",
    "train": "train adapters: LoRA-XS, MiSS, LoRA and nine more methods",
    "evaluate": "score adapters, many at once, through the serving engine",
    "adapters": "list, push, show, activate, share, tag, rm, check, convert, export, import",
    "keys": "create, list, change or revoke the API keys of a registry",
    "doctor": "check a registry's catalog against its store, and repair it",
    "basis": "export or import the shared basis that LoRA-XS adapters live in",
    "bench": "measure a running server, or the engine alone",
    "pull": "fetch a base model known by name",
    "env": "print what a bug report needs to say about this machine",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, dispatch, return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"shoal {shoal.__version__}")
        return 0
    verb = arguments[0]
    if verb not in VERBS:
        print(f"error: no verb {verb!r}\nhint: one of {', '.join(VERBS)}", file=sys.stderr)
        return 2
    logging.basicConfig(
        stream=sys.stderr, level="INFO", format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    # One line for each HTTP request that a verb makes is not what its user asked to see.
    for chatty in ("httpx", "alembic", "aiobotocore", "botocore"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    module = importlib.import_module(f"shoal.server.cli.{verb}")
    parser = argparse.ArgumentParser(
        prog=f"shoal {verb}",
        description=VERBS[verb],
    )
    module.add_arguments(parser)
    try:
        return int(module.run(parser.parse_args(arguments[1:])))
    except KeyboardInterrupt:
        return 130


def _usage() -> str:
    verbs = "\n".join(f"  {name:<10} {help}" for name, help in VERBS.items())
    return (
        f"shoal {shoal.__version__}: one resident model, a million tiny adapters\n\n"
        f"usage: shoal VERB ...\n\n{verbs}\n\nshoal VERB --help says more."
    )


if __name__ == "__main__":
    sys.exit(main())
