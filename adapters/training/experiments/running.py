"""Trains a group of runs side by side and turns what the trainer wrote into lines of the log."""

import functools
import gc
import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.data import Example, load_examples
from shoal.adapters.training.data.examples import TooLong
from shoal.adapters.training.errors import Diverged
from shoal.adapters.training.experiments.choosing import unscored
from shoal.adapters.training.experiments.log import Line, Log
from shoal.adapters.training.experiments.place import place
from shoal.adapters.training.experiments.settings import Group
from shoal.adapters.training.experiments.tasks import path_of
from shoal.adapters.training.lanes import Lane
from shoal.adapters.training.metrics import read_evals, read_steps
from shoal.adapters.training.record import TrainResult
from shoal.adapters.training.trainer import LoadExamples, train

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lab:
    """Where experiments find and leave things.

    Attributes:
        base: the base model.
        data: folder of the tasks' splits.
        out: folder of the log and of the runs' directories.
        cache: where decompositions of the base are kept.
        device: as the trainer's option.
        steps: updates of a run.
        seeds: of the runs that count.
        log: the results.
    """

    base: Path
    data: Path
    out: Path
    cache: Path
    device: str
    steps: int
    seeds: tuple[int, ...]
    log: Log

    def present(self, line: Line) -> bool:
        """Whether a run's adapter is still there."""
        return (self.out / str(line["directory"])).is_dir()

    def unscored(self) -> list[str]:
        """Runs that can be scored and were not."""
        return unscored(self.log, self.seeds, self.present)

    def directory(self, group: Group) -> Path:
        """Where a group's runs lie, one folder a lane."""
        return self.out / "runs" / group.id


def run_group(lab: Lab, table: str, group: Group) -> None:
    """Train a group and log each lane; one that diverged is logged as such.

    Raises:
        KeyboardInterrupt: a signal ended it early; nothing of it is logged.
    """
    directory = lab.directory(group)
    config = config_of(lab, group, directory)
    lanes = [
        Lane(name=run, seed=seed, lr=rate)
        for run, (seed, rate) in zip(group.runs, group.lanes, strict=True)
    ]
    forget_peak()
    started = time.perf_counter()
    try:
        results: Sequence[TrainResult | None] = train(
            config,
            lanes=lanes,
            cache_dir=lab.cache,
            progress=False,
            load=_kept_examples(lab.base),
            plots=False,
        )
    except Diverged as error:
        log.warning("diverged group=%s: %s", group.id, error)
        results = [None] * len(lanes)
    seconds = time.perf_counter() - started
    if any(result is not None and result.fate == "running" for result in results):
        raise KeyboardInterrupt
    for lane, result in zip(lanes, results, strict=True):
        measured: dict[str, Any] = {"diverged": True, "final_loss": None}
        if result is not None and result.fate == "finished":
            measured = _measured(directory / lane.name, result)
        lab.log.append(
            "run",
            id=lane.name,
            table=table,
            label=group.setting.label,
            method=group.setting.method,
            options=group.setting.asked,
            task=group.task,
            seed=lane.seed,
            lr=lane.lr,
            steps=group.steps,
            lanes=len(lanes),
            directory=str((directory / lane.name).relative_to(lab.out)),
            seconds=round(seconds, 2),
            **measured,
            **place(),
        )


@functools.cache
def _kept_examples(base: Path) -> LoadExamples:
    """Tokenises each of the tasks' files once for all groups, which takes as long as many steps."""
    kept: dict[tuple[Path, int, str], list[Example]] = {}

    def load(path: Path, tokenizer: Any, max_length: int, *, too_long: TooLong) -> list[Example]:
        key = (path, max_length, too_long)
        if key not in kept:
            kept[key] = load_examples(path, tokenizer, max_length, too_long=too_long)
        return kept[key]

    return load


def config_of(lab: Lab, group: Group, directory: Path, *, validate: bool = True) -> TrainConfig:
    """The trainer's options for a group; ``validate``: measure on the validation split."""
    return TrainConfig(
        method=group.setting.method,  # type: ignore[arg-type]
        base=lab.base,
        data=path_of(lab.data, group.task, "train"),
        eval_data=path_of(lab.data, group.task, "valid") if validate else None,
        out=directory,
        steps=group.steps,
        save_every=group.steps,
        device=lab.device,
        overwrite=True,
        **group.setting.asked,
    )


def _measured(directory: Path, result: TrainResult) -> dict[str, Any]:
    """What one lane's files and result say.

    Losses are in nats per supervised token: ``initial`` and ``final`` on the validation split,
    ``early`` and ``late`` of the first and last tenth of the updates on what was trained.
    """
    steps = read_steps(directory / "metrics.jsonl")
    evals = read_evals(directory / "eval.jsonl")
    losses = [step.loss for step in steps]
    tenth = max(1, len(losses) // 10)
    return {
        "parameters": result.parameters,
        "step_ms": round(1e3 * statistics.median(step.seconds for step in steps), 3),
        "train_seconds": result.seconds,
        "peak_memory": result.peak_bytes,
        "initial_loss": evals[0].loss,
        "final_loss": evals[-1].loss,
        "early_loss": statistics.fmean(losses[:tenth]),
        "late_loss": statistics.fmean(losses[-tenth:]),
        "first_grad_norm": steps[0].grad_norm,
        "losses": [round(loss, 4) for loss in losses[:: max(1, tenth // 3)]],
    }


def forget_peak() -> None:
    """Peak memory is of one group, not of those before it."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
