"""``shoal serve [MODEL]``: a base model and its adapters behind an OpenAI-style endpoint."""

import argparse
import logging
import sys

from shoal.server import config
from shoal.server.config import ServeConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    try:
        asked = config.from_args(args)
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    logging.getLogger().setLevel(asked.log_level.upper())
    return _serve(asked)


def _serve(asked: ServeConfig) -> int:
    # Imported here, so that `--help` and a bad flag do not wait for torch.
    import torch

    from shoal.adapters.library import RegistryError
    from shoal.server.assemble import assemble, resolve_device
    from shoal.server.http.app import create_app
    from shoal.server.http.auth import check_exposure
    from shoal.server.http.serving import serve
    from shoal.server.model.config import ModelError
    from shoal.server.workers.processes import started
    from shoal.server.workers.serving import serve_apart

    try:
        check_exposure(asked)
        count = asked.http_processes(resolve_device(asked.device).type)
        if not count:
            with assemble(asked) as services:
                return serve(create_app(services), services, asked)
        # First, so that they start while the model is loaded.
        with started(count) as workers, assemble(asked) as services:
            return serve_apart(services, asked, workers)
    except (ModelError, RegistryError, OSError, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as problem:
        print(
            f"error: the GPU ran out of memory: {str(problem).splitlines()[0]}\n"
            "hint: lower --gpu-memory-utilization, --adapter-memory, --max-num-batched-tokens or"
            " --max-num-seqs",
            file=sys.stderr,
        )
        return 1
