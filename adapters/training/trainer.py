"""``train``: a run from its options to the adapters it leaves."""

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import overload

import torch

from shoal.adapters.training.activations import checkpoint_activations
from shoal.adapters.training.batching import Batching
from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.data import TOO_LONG, Example, load_examples, read_records
from shoal.adapters.training.environment import peak_bytes
from shoal.adapters.training.errors import OptionRejected
from shoal.adapters.training.lanes import Lane, LaneRun, check_lanes
from shoal.adapters.training.loading import (
    check_tokens,
    device_of,
    exact_weights,
    fitting,
    load_base,
)
from shoal.adapters.training.loop import OnStep, TrainingLoop
from shoal.adapters.training.methods.attaching import shape_of
from shoal.adapters.training.methods.source import Source
from shoal.adapters.training.methods.table import attach_all, method_of
from shoal.adapters.training.metrics import plot_lanes, plot_loss, read_evals, read_steps
from shoal.adapters.training.record import RunRecord, TrainResult, fingerprint_of, result_of
from shoal.adapters.training.rundir import RunDirectory, claimed
from shoal.adapters.training.runner import StepRunner, runner_for
from shoal.adapters.training.step import TrainStep
from shoal.adapters.training.world import World

__all__ = ["Lane", "OnStep", "TrainResult", "train"]

# As `load_examples`.
LoadExamples = Callable[..., list[Example]]


@overload
def train(
    config: TrainConfig,
    *,
    cache_dir: Path,
    progress: bool = True,
    on_step: OnStep | None = None,
    world: World | None = None,
    load: LoadExamples = load_examples,
    plots: bool = True,
) -> TrainResult: ...


@overload
def train(
    config: TrainConfig,
    *,
    lanes: Sequence[Lane],
    cache_dir: Path,
    progress: bool = True,
    on_step: OnStep | None = None,
    world: World | None = None,
    load: LoadExamples = load_examples,
    plots: bool = True,
) -> list[TrainResult]: ...


def train(
    config: TrainConfig,
    *,
    lanes: Sequence[Lane] = (),
    cache_dir: Path,
    progress: bool = True,
    on_step: OnStep | None = None,
    world: World | None = None,
    load: LoadExamples = load_examples,
    plots: bool = True,
) -> TrainResult | list[TrainResult]:
    """Train adapters as ``config`` says and write them to the run directory.

    Args:
        config: what to do.
        lanes: train one adapter for each of them, side by side, into ``OUT/NAME``. Empty: a single
            one into ``OUT``, with the config's seed, learning rate and data.
        cache_dir: where what was computed of bases is kept.
        progress: draw progress bars on standard error.
        on_step: called after every optimiser step, once for each lane that made it.
        world: the processes that train together; None: as torchrun says.
        load: reads and tokenises a source of data; who trains on the same data many times may keep
            what it returns, which is not changed.
        plots: draw each lane's loss, and all of them in one.

    Returns:
        How it ended; with lanes, how each did. SIGINT or SIGTERM ends a run after the current
        step, with a checkpoint.

    Raises:
        TrainingError: an option, the data, the base or the run directory breaks a rule; what is
            refused leaves the run directory as it was. Or every lane diverged.
    """
    check_lanes(lanes)
    if config.seeds and not lanes:
        raise OptionRejected("seeds", config.seeds, "needs a lane for each, see lanes_of")
    world = World.of_environment() if world is None else world
    RunDirectory(config.out).check(resume=config.resume, overwrite=config.overwrite)
    rows = world.rows(config.batch_size)
    device = device_of(config.device, world.local_rank)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with world.joined(device):
        training = _Training(config, lanes, cache_dir, progress, world, rows, device, load)
        results = training.run(on_step, plots=plots)
    return results if lanes else results[0]


class _Training:
    """Everything a run consists of, put together."""

    def __init__(
        self,
        config: TrainConfig,
        lanes: Sequence[Lane],
        cache_dir: Path,
        progress: bool,
        world: World,
        rows: slice,
        device: torch.device,
        load: LoadExamples,
    ) -> None:
        self.load = load
        self.config, self.world, self.device = config, world, device
        self.progress = progress and world.writes
        asked = list(lanes) or [Lane("", config.seed)]
        sources = [config.data if lane.data is None else lane.data for lane in asked]
        # Loading the base takes a while: what is wrong with the records is said before it.
        for path in dict.fromkeys(filter(None, (*sources, config.eval_data))):
            read_records(path)
        self.base = load_base(config.base, device, config.dtype)
        self.config = config = fitting(config, self.base)
        examples = functools.cache(self._examples)
        evaluation = [] if config.eval_data is None else examples(config.eval_data)
        self.lanes = [
            LaneRun(
                lane,
                RunDirectory(config.out / lane.name),
                examples(path),
                config.learning_rate if lane.lr is None else lane.lr,
            )
            for lane, path in zip(asked, sources, strict=True)
        ]
        shape = shape_of(self.base.model, config.base.stem, self.base.digest)
        self.source = Source(
            exact_weights(self.base),
            shape,
            cache_dir,
            basis_rank=config.basis_rank,
            progress=self.progress,
        )
        self.method = method_of(config)
        with world.first_writer():  # it computes what the others then find in the cache
            seeds = [lane.seed for lane in asked]
            self.adapted = attach_all(self.base.model, config, self.source, seeds)
        fingerprint = fingerprint_of(config, self.base.digest, self.lanes, evaluation)
        runner = self._runner()
        self.loop = TrainingLoop(
            config,
            self.lanes,
            runner,
            self._batching(runner, rows),
            evaluation,
            fingerprint,
            world,
        )
        self.parameters = runner.step.optimizer.values.shape[1]
        self.record = RunRecord(config, fingerprint, self.parameters, device, world.size)

    def run(self, on_step: OnStep | None, *, plots: bool) -> list[TrainResult]:
        """Make the steps and write what they lead to."""
        with ExitStack() as stack:
            if self.world.writes:
                stack.enter_context(claimed(self.config.out))
                # Another process may have been here since.
                RunDirectory(self.config.out).check(
                    resume=self.config.resume, overwrite=self.config.overwrite
                )
            return self._run(on_step, plots=plots)

    def _run(self, on_step: OnStep | None, *, plots: bool) -> list[TrainResult]:
        if self.config.resume:
            self.loop.restore()
        if self.world.writes:
            self._prepare()
        self.world.wait()
        finished = False
        try:
            finished = self.loop.run_steps(self.progress, on_step)
        finally:
            results = [self._result(lane, finished) for lane in self.lanes]
            if self.world.writes:
                self._drop_stale_adapters()
                self.record.write(self.lanes, results)
        self.loop.take_best()
        if self.world.writes:
            self._write_adapters()
            if plots:
                self._draw()
        self.world.wait()
        return results

    def _prepare(self) -> None:
        """Make the run directories ready."""
        root = RunDirectory(self.config.out)
        if self.config.resume:
            root.sweep()
        else:
            root.clear()
        for lane in self.lanes:
            if self.config.resume:
                lane.run.sweep()
                lane.cut_logs(self.loop.step)
            else:
                lane.run.clear()
        self.record.write(self.lanes)

    def _drop_stale_adapters(self) -> None:
        """A lane that diverged leaves none, also none of when it was interrupted before that."""
        for lane in self.lanes:
            if lane.fate == "diverged":
                lane.run.drop_adapter()

    def _write_adapters(self) -> None:
        for index, lane in enumerate(self.lanes):
            if lane.fate != "diverged":
                self.method.write(lane.run.path, self.adapted, index, self.source)

    def _draw(self) -> None:
        for lane in self.lanes:
            plot_loss(read_steps(lane.run.metrics), read_evals(lane.run.evals), lane.run.plot)
        if len(self.lanes) > 1:
            curves = {lane.lane.name: read_steps(lane.run.metrics) for lane in self.lanes}
            plot_lanes(curves, RunDirectory(self.config.out).plot)

    def _result(self, lane: LaneRun, finished: bool) -> TrainResult:
        return result_of(
            lane,
            finished=finished,
            parameters=self.parameters,
            seconds=self.loop.seconds,
            peak_bytes=peak_bytes(self.device),
        )

    def _examples(self, path: Path) -> list[Example]:
        config = self.config
        too_long = next(choice for choice in TOO_LONG if choice == config.too_long)
        tokenizer = self.base.tokenizer
        found = self.load(path, tokenizer, config.max_length, too_long=too_long)
        check_tokens(self.base, found)
        return found

    def _runner(self) -> StepRunner:
        config, world = self.config, self.world
        if config.checkpoint_activations:
            checkpoint_activations(self.base.model)
        step = TrainStep(
            self.base.model,
            self.adapted,
            self.method,
            weight_decay=config.weight_decay,
            clip=config.clip,
            parts=config.accumulate * world.size,
        )

        def reduce() -> None:
            for tensor in (step.optimizer.grads, step.loss, step.votes):
                world.sum(tensor)

        return runner_for(
            step, captured=config.graphs == "auto", reduce=reduce if world.size > 1 else None
        )

    def _batching(self, runner: StepRunner, rows: slice) -> Batching:
        return Batching(
            self.config,
            # What the padding is does not matter (see LaneLoss), only that it is a token: some
            # tokenizers have a padding token that the model lacks.
            pad_id=0,
            fixed_shapes=runner.fixed_shapes,
            pinned=self.device.type == "cuda",
            rows=rows if self.world.size > 1 else None,
        )
