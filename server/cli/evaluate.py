"""``shoal evaluate``: score adapters, many at once, through the serving engine.

Writes into ``--out``: ``results.jsonl`` (a line for each adapter, task and metric, appended when it
is known; what is there is not measured again), ``answers.jsonl``, ``table.md`` and plots.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.server import config as serving
from shoal.server.config import ServeConfig

if TYPE_CHECKING:  # torch takes seconds that `--help` should not
    from shoal.adapters.training.evaluation.evaluating import Evaluation
    from shoal.adapters.training.evaluation.tasks import Task

METRICS = ("exact", "choice", "forgetting")
# What of `shoal serve` decides the engine.
ENGINE = (
    "model",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "dtype",
    "device",
    "attention",
    "gpu_memory_utilization",
    "kv_cache_memory",
    "adapter_memory",
    "host_adapter_memory",
    "spectral_memory",
    "registry",
    "store",
    "basis_rank",
)
# Rows of scoring steps are whole, so a step has to take the longest.
_BATCHED_TOKENS = 4096
_SPECTRAL_BYTES = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapters",
        nargs="+",
        default=[],
        metavar="DIR",
        help="adapter directories; with --registry, [OWNER/]NAME[@VERSION] in it",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        metavar="TASK",
        help="FILE.jsonl or FILE.txt, or reasoning-gym:NAME; then :key=value,… of name, limit,"
        " max_tokens, extract, length (windows of texts), and of the generator (size, seed, …)",
    )
    parser.add_argument(
        "--metrics",
        type=lambda text: tuple(part.strip() for part in text.split(",")),
        default=None,
        help=f"of {','.join(METRICS)} (default: those that the tasks are for)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for results and reports")
    parser.add_argument("--quiet", action="store_true", help="no progress bars, errors alone")
    serving.add_arguments(
        parser,
        only=ENGINE,
        defaults={"max_num_batched_tokens": _BATCHED_TOKENS, "spectral_memory": _SPECTRAL_BYTES},
    )


def run(args: argparse.Namespace) -> int:
    """0: measured. 2: something was refused before, 1: something failed."""
    try:
        asked = ServeConfig(**{name: getattr(args, name) for name in ENGINE})
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    logging.getLogger().setLevel("ERROR" if args.quiet else "WARNING")
    # Imported here, so that `--help` and a bad flag do not wait for torch.
    import torch

    from shoal.adapters.errors import AdapterError
    from shoal.adapters.registry.errors import RegistryError
    from shoal.adapters.training.errors import TrainingError
    from shoal.server.errors import ShoalError
    from shoal.server.evaluating.engine_source import AdapterUnusable
    from shoal.server.model.config import ModelError

    try:
        return _evaluate(args, asked)
    except (TrainingError, AdapterUnusable, AdapterError) as refused:
        print(f"shoal evaluate: {refused}", file=sys.stderr)
        return 2
    except (ModelError, RegistryError, ShoalError, OSError, ValueError) as problem:
        print(f"shoal evaluate: {problem}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as problem:
        print(f"shoal evaluate: {str(problem).splitlines()[0]}", file=sys.stderr)
        print("hint: lower --max-num-batched-tokens or --max-num-seqs", file=sys.stderr)
        return 1


def _evaluate(args: argparse.Namespace, asked: ServeConfig) -> int:
    from shoal.adapters.training.evaluation.report import throughput_line
    from shoal.server.evaluating.run import evaluate_directories, read_tasks

    tasks = read_tasks(args.tasks)
    metrics = args.metrics or tuple(m for m in METRICS if any(t.metric == m for t in tasks))
    if asked.registry is None:
        directories = [Path(name) for name in args.adapters]
        evaluation = evaluate_directories(
            directories,
            tasks,
            config=asked,
            metrics=metrics,
            out=args.out,
            progress=not args.quiet,
        )
    else:
        evaluation = _of_registry(args, asked, tasks, metrics)
    print((args.out / "table.md").read_text(encoding="utf-8"), end="")
    if not evaluation.throughput:
        print(f"{args.out} had every score already: nothing was measured", file=sys.stderr)
    for part in evaluation.throughput:
        print(throughput_line(part), file=sys.stderr)
    return 0


def _of_registry(
    args: argparse.Namespace,
    asked: ServeConfig,
    tasks: "Sequence[Task]",
    metrics: Sequence[str],
) -> "Evaluation":
    from shoal.adapters.training.evaluation.runs import AdapterFacts
    from shoal.server.evaluating.engine_source import open_source
    from shoal.server.evaluating.run import evaluate_on

    with open_source(asked) as source:
        facts: dict[str, Any] = {}
        for name in dict.fromkeys(args.adapters):
            info = source.find(name)
            facts[name] = AdapterFacts(info.format, info.rank, None, info.bytes)
        return evaluate_on(
            source,
            list(facts),
            tasks,
            metrics=metrics,
            out=args.out,
            facts=facts,
            progress=not args.quiet,
        )
