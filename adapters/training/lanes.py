"""Lanes: the adapters that one run trains side by side, as the host knows them.

The device keeps their values in one tensor; here are their names, data, reports and fates.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.data import Example, join, row_order
from shoal.adapters.training.errors import OptionRejected
from shoal.adapters.training.metrics import EvalMetrics, JsonLines, StepMetrics, keep_until
from shoal.adapters.training.rundir import RunDirectory
from shoal.adapters.training.stopping import BestSoFar

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")

Fate = Literal["running", "finished", "patience", "diverged"]


@dataclass(frozen=True, slots=True)
class Lane:
    """One adapter among those that a run trains.

    Attributes:
        name: of its directory in the run's.
        seed: decides its initial values and the order of its data.
        lr: its peak learning rate; None: the config's.
        data: its records; None: the config's.
    """

    name: str
    seed: int
    lr: float | None = None
    data: Path | None = None


def lanes_of(config: TrainConfig) -> list[Lane]:
    """A lane for each of ``config.seeds``; none for a plain run."""
    return [Lane(f"seed-{seed}", seed) for seed in config.seeds]


def check_lanes(lanes: Sequence[Lane]) -> None:
    """OptionRejected unless names can be directories and differ."""
    for lane in lanes:
        if not _NAME.fullmatch(lane.name) or lane.name == "checkpoint":
            raise OptionRejected("lanes", repr(lane.name), "is no name for a lane's directory")
        if lane.lr is not None and not (math.isfinite(lane.lr) and lane.lr > 0):
            raise OptionRejected("lanes", f"{lane.name} with lr {lane.lr}", "must be positive")
    if len({lane.name for lane in lanes}) < len(lanes):
        raise OptionRejected("lanes", [lane.name for lane in lanes], "names a lane twice")


@dataclass(slots=True)
class LaneRun:
    """What the host keeps of a lane while it runs.

    Attributes:
        lane: what was asked for.
        run: its directory.
        examples: its data.
        lr: its peak learning rate.
        step: updates made.
        fate: whether it goes on, or why not.
        error: what to tell the user when it diverged.
        loss: of its last step, NaN before the first.
        best: its evaluations.
    """

    lane: Lane
    run: RunDirectory
    examples: Sequence[Example]
    lr: float
    step: int = 0
    fate: Fate = "running"
    error: str | None = None
    loss: float = math.nan
    best: BestSoFar = field(default_factory=BestSoFar)
    metrics: JsonLines | None = None
    evals: JsonLines | None = None

    def open_logs(self, stack: ExitStack, evaluates: bool) -> None:
        """Open the logs until the stack is left."""
        self.metrics = stack.enter_context(JsonLines(self.run.metrics))
        if evaluates:
            self.evals = stack.enter_context(JsonLines(self.run.evals))

    def note_step(self, done: StepMetrics) -> None:
        """Log a step."""
        self.loss = done.loss
        if done.error is None:
            self.step = done.step
        else:
            self.fate, self.error = "diverged", done.error
        if self.metrics is not None:
            self.metrics.append(done)

    def note_evaluation(self, step: int, loss: float) -> bool:
        """Log an evaluation; True when it is the best so far."""
        if self.evals is not None:
            self.evals.append(EvalMetrics(step, loss))
        return self.best.offer(step, loss)

    def sync(self) -> None:
        """Return when the logs are on disk."""
        for log in (self.metrics, self.evals):
            if log is not None:
                log.sync()

    def progress(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {
            "step": self.step,
            "fate": self.fate,
            "error": self.error,
            "loss": self.loss,
            "best": asdict(self.best),
        }

    def restore(self, progress: dict[str, Any]) -> None:
        """Take what a checkpoint held."""
        self.step, self.fate = progress["step"], progress["fate"]
        self.error, self.loss = progress["error"], progress["loss"]
        self.best = BestSoFar(**progress["best"])

    def cut_logs(self, step: int) -> None:
        """Drop the lines of steps after ``step``."""
        keep_until(self.run.metrics, step)
        keep_until(self.run.evals, step)

    def rows(self, config: TrainConfig, skip: int) -> Iterator[Example]:
        """The rows of its batches in order, from the row numbered ``skip`` on."""
        lengths = [len(example.input_ids) for example in self.examples]
        capacity = config.max_length if config.pack else None
        for indices in islice(row_order(lengths, self.lane.seed, capacity), skip, None):
            chosen = [self.examples[index] for index in indices]
            yield join(chosen) if config.pack else chosen[0]
