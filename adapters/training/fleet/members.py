"""``Member``: what the host knows of a tenant that takes part: data, progress and reports."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from shoal.adapters.training.data import order_of
from shoal.adapters.training.fleet.finishing import Finished
from shoal.adapters.training.fleet.inputs import Row
from shoal.adapters.training.fleet.tenants import Tenant
from shoal.adapters.training.metrics import EvalMetrics, JsonLines, StepMetrics, keep_until
from shoal.adapters.training.rundir import RunDirectory
from shoal.adapters.training.schedule import learning_rate
from shoal.adapters.training.stopping import BestSoFar


@dataclass(slots=True)
class Member:
    """A tenant that takes part.

    Attributes:
        tenant: who.
        rows: its data.
        evaluation: what it is measured on; empty for nothing.
        digest: of both.
        step: updates made, of which the host knows.
        issued: updates made or under way.
        loss: of the last one.
        eval_loss: of the last evaluation.
        best: its evaluations.
        fate: ``running``, ``finished``, ``patience`` or ``diverged``.
        lines: steps and evaluations that are not in its files yet.
    """

    tenant: Tenant
    rows: Sequence[Row]
    evaluation: Sequence[Row]
    digest: str
    step: int = 0
    issued: int = 0
    loss: float | None = None
    eval_loss: float | None = None
    best: BestSoFar = field(default_factory=BestSoFar)
    fate: str = "running"
    lines: list[StepMetrics | EvalMetrics] = field(default_factory=list)
    # The order of the data from the row numbered `_taken` on, and the batch that was made last.
    _order: Iterator[int] = field(default_factory=lambda: iter(()))
    _taken: int = 0
    _batch: tuple[int, list[Row]] = (-1, [])

    @property
    def directory(self) -> RunDirectory:
        """Where its files are."""
        return RunDirectory(self.tenant.config.out)

    def batch(self, step: int) -> list[Row]:
        """The rows of update ``step`` (from 0): as a plain run takes them."""
        if step != self._batch[0]:
            config = self.tenant.config
            start = step * config.batch_size
            if start < self._taken:
                self._order, self._taken = iter(()), 0
            if self._taken == 0:
                self._order = order_of(len(self.rows), config.seed)
            indices = islice(
                self._order, start - self._taken, start - self._taken + config.batch_size
            )
            self._batch = step, [self.rows[index] for index in indices]
            self._taken = start + config.batch_size
        return self._batch[1]

    def rate(self, step: int) -> float:
        """Learning rate of update ``step`` (from 0)."""
        return learning_rate(self.tenant.config, step)

    def due(self) -> bool:
        """Whether it is to be measured now."""
        return bool(self.evaluation) and self._on_beat(self.step)

    def matters(self, step: int) -> bool:
        """Whether something is to be done with its values after so many updates."""
        return step == self.tenant.config.steps or (bool(self.evaluation) and self._on_beat(step))

    def _on_beat(self, step: int) -> bool:
        config = self.tenant.config
        return step % config.evaluation_interval == 0 or step == config.steps

    def note_evaluation(self, loss: float) -> bool:
        """Log one; True when it is the best so far."""
        self.eval_loss = loss
        self.lines.append(EvalMetrics(self.step, loss))
        return self.best.offer(self.step, loss)

    def flush(self) -> None:
        """Append what is not in its files yet; the files are closed again."""
        run = self.directory
        for path, kind in ((run.metrics, StepMetrics), (run.evals, EvalMetrics)):
            lines = [line for line in self.lines if isinstance(line, kind)]
            if lines:
                run.path.mkdir(parents=True, exist_ok=True)
                with JsonLines(path) as log:
                    for line in lines:
                        log.append(line)
        self.lines.clear()

    def result(self) -> Finished:
        """How it ended, once it has."""
        best = self.tenant.config.patience is not None
        return Finished(
            reference=self.tenant.reference,
            fate=self.fate,
            steps=self.step,
            loss=self.loss,
            eval_loss=self.best.loss if best and self.best.step >= 0 else self.eval_loss,
        )

    def progress(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {
            "step": self.step,
            "loss": self.loss,
            "eval_loss": self.eval_loss,
            "best": asdict(self.best),
        }

    def restore(self, progress: dict[str, Any]) -> None:
        """Take what a checkpoint held, and drop the log lines of steps after it."""
        self.step = self.issued = progress["step"]
        self.loss = progress["loss"]
        self.eval_loss, self.best = progress["eval_loss"], BestSoFar(**progress["best"])
        self.directory.sweep()
        keep_until(self.directory.metrics, self.step)
        keep_until(self.directory.evals, self.step)
