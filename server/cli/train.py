"""``shoal train``: the offline trainer's command line, generated from ``TrainConfig``."""

import argparse
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.adapters.training.config import TrainConfig
from shoal.server.cli import train_fleet

if TYPE_CHECKING:
    from shoal.adapters.training.trainer import TrainResult

# Exit status of a run that SIGINT or SIGTERM ended early, as shells report an interrupted command.
INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each field of ``TrainConfig``."""
    for spec in fields(TrainConfig):
        flag = "--" + spec.name.replace("_", "-")
        text = spec.metadata["help"].replace("%", "%%")
        if spec.type is bool:
            parser.add_argument(flag, action="store_true", help=text)
            continue
        if spec.default is not MISSING and spec.default is not None:
            shown = ",".join(spec.default) if isinstance(spec.default, tuple) else spec.default
            text += f" (default: {shown})" if shown != "" else ""
        parser.add_argument(
            flag,
            type=_converter(spec.name, spec.type),
            choices=spec.metadata.get("choices"),
            required=spec.default is MISSING and spec.name != "data",
            default=None if spec.default is MISSING else spec.default,
            help=text,
        )
    train_fleet.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train as asked.

    Returns:
        0 when finished, 130 when interrupted, 2 when something was refused, 1 when the disk or the
        memory failed.
    """
    # Imported here: torch and transformers take seconds that `--help` should not.
    import torch

    from shoal.adapters.errors import AdapterError
    from shoal.adapters.training.errors import TrainingError
    from shoal.server.model.config import ModelError

    try:
        train_fleet.check(args)
        return train_fleet.run(args) if hasattr(args, "fleet") else _train(args)
    except (TrainingError, AdapterError, ModelError) as error:
        print(f"shoal train: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"shoal train: {error}", file=sys.stderr)
        print(
            "hint: once that is mended, --resume goes on from the last checkpoint if there is one",
            file=sys.stderr,
        )
        return 1
    except torch.OutOfMemoryError as error:
        print(f"shoal train: {str(error).splitlines()[0]}", file=sys.stderr)
        print(
            "hint: lower --batch-size (with --fleet: --rows) or --max-length, or give "
            "--checkpoint-activations",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("shoal train: interrupted; what follows the last checkpoint is lost", file=sys.stderr)
        return INTERRUPTED


def _train(args: argparse.Namespace) -> int:
    from platformdirs import user_cache_path

    from shoal.adapters.training.lanes import lanes_of
    from shoal.adapters.training.trainer import train
    from shoal.adapters.training.world import World
    from shoal.server.model.pull import resolve_model

    values = {spec.name: getattr(args, spec.name) for spec in fields(TrainConfig)}
    asked = TrainConfig(**values)  # refuses bad options before anything is downloaded
    values["base"] = resolve_model(str(asked.base))
    config, cache_dir = TrainConfig(**values), user_cache_path("shoal") / "bases"
    world = World.of_environment()
    results = (
        train(config, lanes=lanes_of(config), cache_dir=cache_dir, world=world)
        if config.seeds
        else [train(config, cache_dir=cache_dir, world=world)]
    )
    if not all(result.finished for result in results):
        steps = max(result.steps for result in results)
        print(
            f"shoal train: interrupted after step {steps} of {asked.steps}; the checkpoint "
            f"is in {asked.out}, --resume goes on from it",
            file=sys.stderr,
        )
        return INTERRUPTED
    if world.writes:
        for result in results:
            _report(asked.out / result.name, asked.method, result)
    # A lane that diverged leaves no adapter; the others' are there.
    return 2 if any(result.error for result in results) else 0


def _report(out: Path, method: str, result: "TrainResult") -> None:
    if result.error:
        print(f"shoal train: {out}: {result.error}", file=sys.stderr)
        return
    measured = result.best_loss is not None
    best = f", best {result.best_loss:.3f} after {result.best_step}" if measured else ""
    print(
        f"{out}: {method} adapter of {result.parameters} values, "
        f"loss {result.loss:.3f} after {result.steps} steps{best}"
    )


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        rule = f"{text!r} is not a list of whole numbers separated by commas"
        raise argparse.ArgumentTypeError(rule) from None


def _converter(name: str, kind: Any) -> Any:
    """What turns an option's text into the field's type."""
    if name == "targets":
        return lambda text: tuple(part.strip() for part in text.split(","))
    if kind == tuple[int, ...]:
        return _integers
    for candidate in (Path, int, float):
        if kind in (candidate, candidate | None):
            return candidate
    return str
