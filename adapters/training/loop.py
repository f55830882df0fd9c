"""The loop over steps: what happens between them, and when.

What a run learns is decided by its options, data and base alone: no clock, no global random state.
The order of the data is a function of the seed and the number of examples, and the forward pass
draws nothing, so a resumed run continues bit for bit (on the same device and thread count).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from shoal.adapters.training.batching import Batching, StepBatches
from shoal.adapters.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.data import Example
from shoal.adapters.training.environment import peak_bytes
from shoal.adapters.training.errors import Diverged, RunDirectoryError
from shoal.adapters.training.interrupt import StopRequest
from shoal.adapters.training.lanes import LaneRun
from shoal.adapters.training.metrics import StepMetrics
from shoal.adapters.training.reading import OutcomeReader, StepOutcome
from shoal.adapters.training.rundir import RunDirectory
from shoal.adapters.training.runner import StepRunner
from shoal.adapters.training.schedule import learning_rate
from shoal.adapters.training.world import World

OnStep = Callable[[StepMetrics], None]


class TrainingLoop:
    """A run's state and its course.

    Attributes:
        step: steps launched, those of earlier processes included.
        seconds: spent on steps by all processes that worked on the run.
    """

    def __init__(
        self,
        config: TrainConfig,
        lanes: Sequence[LaneRun],
        runner: StepRunner,
        batching: Batching,
        evaluation: Sequence[Example],
        fingerprint: Mapping[str, object],
        world: World,
        lag: int | None = None,
    ) -> None:
        """Begin at step 0.

        Args:
            config: when to do what.
            lanes: what is trained, in the order of the device's lanes.
            runner: makes steps.
            batching: makes batches.
            evaluation: what to measure the loss on; may be empty.
            fingerprint: what a resumed run must share with this one.
            world: the processes that train together.
            lag: see ``OutcomeReader``.
        """
        self.config = config
        self.lanes = lanes
        self.step = 0
        self.seconds = 0.0
        self._runner = runner
        self._core = runner.step
        self._optimizer = runner.step.optimizer
        self._batching = batching
        self._evaluation = evaluation
        self._evaluated = -1
        self._fingerprint = fingerprint
        self._world = world
        self._run = RunDirectory(config.out)
        self._reader = OutcomeReader(self._core.device, lag)
        # What each lane's best evaluation was measured with; only early stopping goes back to it.
        keeps = config.patience is not None
        self._best = self._optimizer.values.clone() if keeps else None
        # Rates of all steps, on the device: a step must not wait for the host to send its own.
        rates = [[learning_rate(config, k, lane.lr) for lane in lanes] for k in range(config.steps)]
        self._rates = torch.tensor(rates, dtype=torch.float64, device=self._core.device)

    @property
    def stopped(self) -> bool:
        """Whether no lane goes on."""
        return all(lane.fate != "running" for lane in self.lanes)

    @torch.no_grad()
    def restore(self) -> None:
        """Take the run directory's checkpoint.

        Raises:
            RunDirectoryError: there is none.
            ResumeMismatch: it is another run's.
        """
        saved = load_checkpoint(self._run.checkpoint, self._fingerprint)
        places = self._tensors()
        try:
            self._optimizer.load(saved.tensors)
            for name, place in places.items():
                place.copy_(saved.tensors[name])
            for lane, progress in zip(self.lanes, saved.progress["lanes"], strict=True):
                lane.restore(progress)
            self._evaluated, self.seconds = saved.progress["evaluated"], saved.progress["seconds"]
        except (KeyError, RuntimeError) as error:
            where = self._run.checkpoint
            raise RunDirectoryError(
                f"{where} is not a checkpoint of this trainer: {error}"
            ) from error
        self.step = saved.step

    def save(self) -> None:
        """Write a checkpoint; the logs are on disk before it is."""
        for lane in self.lanes:
            lane.sync()
        progress = {
            "lanes": [lane.progress() for lane in self.lanes],
            "evaluated": self._evaluated,
            "seconds": self.seconds,
        }
        if self._world.writes:
            tensors = {**self._optimizer.state(), **self._tensors()}
            save_checkpoint(
                self._run.checkpoint, Checkpoint(self.step, progress, tensors), self._fingerprint
            )

    def take_best(self) -> None:
        """With early stopping, put the best values in the place of the last."""
        if self._best is not None:
            self._optimizer.values.copy_(self._best)

    def run_steps(self, progress: bool, on_step: OnStep | None) -> bool:
        """Make the remaining steps; False when a signal stopped them early.

        Args:
            progress: draw a progress bar on standard error.
            on_step: called with each step of each lane.

        Raises:
            Diverged: every lane did.
        """
        with ExitStack() as stack:
            stop = stack.enter_context(StopRequest())
            if self._world.writes:
                for lane in self.lanes:
                    lane.open_logs(stack, bool(self._evaluation))
            shown = progress and self._world.writes
            total, done = self.config.steps, self.step
            bar = stack.enter_context(
                tqdm(total=total, initial=done, unit="step", disable=not shown)
            )
            self._course(stop, _Reporter(bar, on_step))
            self._raise_if_diverged()
            for lane in self.lanes:
                if lane.fate == "running" and self.step == total:
                    lane.fate = "finished"
            self.save()
        return self.step == total or self.stopped

    def _course(self, stop: StopRequest, reporter: "_Reporter") -> None:
        config = self.config
        batches = self._batching.steps(self.lanes, self.step)
        if self.step == 0:
            self._evaluate(reporter)
            self.save()  # from here on whatever happens can be resumed
        self._reader.start_clock()
        asked = False  # by any process, as all of them know it
        while self.step < config.steps and not self.stopped and not asked:
            if self._world.size == 1 and stop.requested:
                break
            batch = next(batches)
            self._launch(batch, stop.requested)
            asked = self._note(reporter, all_of_them=False)
            evaluates = self._is_due(config.evaluation_interval) or self.step == config.steps
            saves = self._is_due(config.save_every) and self.step < config.steps
            if evaluates or saves:
                asked = self._note(reporter, all_of_them=True) or asked
                if evaluates:
                    self._evaluate(reporter)
                if saves:
                    self.save()
                self._reader.start_clock()
        self._note(reporter, all_of_them=True)

    def _launch(self, batch: StepBatches, votes_to_stop: bool) -> None:
        """Begin the next step; it may still be under way afterwards."""
        self._optimizer.lr.copy_(self._rates[self.step])
        self._core.votes.fill_(float(votes_to_stop))
        self._runner.run(batch.inputs)
        self.step += 1
        self._core.method.after_step(
            self._core.adapted, self.step, self.config.steps, self._optimizer.active
        )
        self._reader.push(self.step, batch.tokens, self._core.record)

    def _note(self, reporter: "_Reporter", *, all_of_them: bool) -> bool:
        """Log the steps that have ended; True when a process among several was told to stop."""
        asked = False
        for outcome in self._reader.ended(all_of_them=all_of_them):
            self.seconds += outcome.seconds
            asked = asked or (self._world.size > 1 and float(outcome.record[3, 0]) > 0)
            peak = peak_bytes(self._core.device)
            done = [
                self._note_lane(lane, index, outcome, peak)
                for index, lane in enumerate(self.lanes)
                if lane.fate == "running"
            ]
            reporter.report(done)
        return asked

    def _note_lane(self, lane: LaneRun, index: int, outcome: StepOutcome, peak: int) -> StepMetrics:
        loss, norm, updated, _ = outcome.record[:, index].tolist()
        done = StepMetrics(
            step=outcome.step,
            loss=loss,
            lr=learning_rate(self.config, outcome.step - 1, lane.lr),
            grad_norm=norm,
            tokens_s=round(outcome.tokens[index] / outcome.seconds, 1),
            seconds=round(outcome.seconds, 6),
            peak_bytes=peak,
            error=None if updated else str(Diverged(outcome.step, loss)),
        )
        lane.note_step(done)
        return done

    def _is_due(self, interval: int) -> bool:
        return self.step % interval == 0

    def _evaluate(self, reporter: "_Reporter") -> None:
        """Measure the loss on the evaluation data, once after each step, and stop lanes early."""
        if not self._evaluation or self._evaluated == self.step or self.stopped:
            return
        self._evaluated = self.step
        with reporter.busy("evaluating"):
            losses = self._evaluation_losses().tolist()
        for index, lane in enumerate(self.lanes):
            if lane.fate != "running":
                continue
            if lane.note_evaluation(self.step, losses[index]) and self._best is not None:
                self._best[index] = self._optimizer.values[index]
            if lane.best.exhausted(self.config.patience):
                lane.fate = "patience"
                self._optimizer.active[index] = False

    def _evaluation_losses(self) -> Tensor:
        """``(lanes,)``, the same in every process."""
        world, device = self._world, self._core.device
        total = torch.zeros(len(self.lanes), device=device)
        for inputs in self._batching.evaluation(
            self._evaluation, len(self.lanes), rank=world.rank, size=world.size
        ):
            total += self._core.losses(inputs.to(device))
        world.sum(total)
        return total

    def _raise_if_diverged(self) -> None:
        if all(lane.fate == "diverged" for lane in self.lanes):
            raise Diverged(self.lanes[0].step + 1, self.lanes[0].loss)

    def _tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds besides the optimiser's."""
        tensors = {
            f"method.{name}": tensor
            for name, tensor in self._core.method.state(self._core.adapted).items()
        }
        if self._best is not None:
            named = self._optimizer.named(self._best)
            tensors |= {f"best.{name}": view for name, view in named.items()}
        return tensors


class _Reporter:
    """Shows steps to whoever watches."""

    def __init__(self, bar: Any, on_step: OnStep | None) -> None:
        self._bar = bar
        self._on_step = on_step

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Something that takes its time between steps."""
        self._bar.set_description(what)
        yield
        self._bar.set_description()

    def report(self, done: Sequence[StepMetrics]) -> None:
        """One step of all lanes that were running."""
        if done:
            loss = sum(step.loss for step in done) / len(done)
            tokens = sum(step.tokens_s for step in done)
            # Drawn by `update`, which knows how often is often enough.
            self._bar.set_postfix(loss=f"{loss:.3f}", tokens_s=f"{tokens:.0f}", refresh=False)
        self._bar.update()
        if self._on_step is not None:
            for step in done:
                self._on_step(step)
