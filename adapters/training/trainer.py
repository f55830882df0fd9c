"""The training run: loop, optimiser, schedule, checkpoints, and the adapter at the end.

A run is decided by its options, data and base alone: no clock, no global random state. The order
of the data is a function of the seed and the number of examples, and the forward pass draws
nothing, so a resumed run continues bit for bit (on the same device and thread count).
"""

import functools
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from shoal.adapters.formats.container import write_atomically
from shoal.adapters.spec import Target
from shoal.adapters.training.checkpoint import load_checkpoint, save_checkpoint
from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.data import (
    Batch,
    Example,
    collate,
    load_examples,
    order_of,
    read_records,
)
from shoal.adapters.training.errors import Diverged
from shoal.adapters.training.interrupt import StopRequest
from shoal.adapters.training.loading import Base, load_base
from shoal.adapters.training.methods.attaching import shape_of, weight_reader
from shoal.adapters.training.methods.contract import AdaptedLinear
from shoal.adapters.training.methods.source import Source
from shoal.adapters.training.methods.table import attach_all, method_of
from shoal.adapters.training.metrics import (
    EvalMetrics,
    JsonLines,
    StepMetrics,
    keep_until,
    plot_loss,
    read_evals,
    read_steps,
)
from shoal.adapters.training.rundir import RunDirectory
from shoal.adapters.weights import WeightOf

log = logging.getLogger(__name__)

# Options that do not change what is learnt; all others must be the same in a resumed run.
_FREE_OPTIONS = (
    "base",
    "data",
    "out",
    "format",
    "eval_data",
    "save_every",
    "device",
    "resume",
    "overwrite",
)

OnStep = Callable[[StepMetrics], None]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended.

    Attributes:
        steps: updates made, earlier runs included.
        finished: False when it was interrupted; ``--resume`` goes on.
        loss: loss of the last step.
        parameters: number of trained values.
    """

    steps: int
    finished: bool
    loss: float
    parameters: int


def train(
    config: TrainConfig, *, cache_dir: Path, progress: bool = True, on_step: OnStep | None = None
) -> TrainResult:
    """Train an adapter as ``config`` says and write it to the run directory.

    Args:
        config: what to do.
        cache_dir: where the base's shared basis is kept.
        progress: draw progress bars on standard error.
        on_step: called after every optimiser step.

    Returns:
        How it ended. SIGINT or SIGTERM ends it after the current step, with a checkpoint.

    Raises:
        TrainingError: an option, the data, the base or the run directory breaks a rule. What is
            refused leaves the run directory as it was.
    """
    run = RunDirectory(config.out)
    run.check(resume=config.resume, overwrite=config.overwrite)
    # Loading the base takes a while: what is wrong with the records is said before it.
    for path in filter(None, (config.data, config.eval_data)):
        read_records(path)
    base = load_base(config.base, config.device, config.dtype)
    examples = load_examples(config.data, base.tokenizer, config.max_length)
    evaluation = (
        []
        if config.eval_data is None
        else load_examples(config.eval_data, base.tokenizer, config.max_length)
    )
    shape = shape_of(base.model, config.base.stem, base.digest)
    source = Source(
        _exact_weights(base), shape, cache_dir, basis_rank=config.basis_rank, progress=progress
    )
    method = method_of(config)
    adapted = attach_all(base.model, config, source)
    trainer = _Trainer(config, base, adapted, examples, evaluation, run)
    if config.resume:
        trainer.restore()
    else:
        run.clear()
    trainer.write_options()
    finished = trainer.run_steps(progress, on_step)
    method.write(config.out, adapted, 0, source)
    steps = read_steps(run.metrics)
    plot_loss(steps, read_evals(run.evals), run.plot)
    loss = steps[-1].loss if steps else math.nan
    return TrainResult(trainer.step, finished, loss, trainer.num_parameters)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of update ``step`` (from 0): a linear rise, then the schedule's fall.

    The last update still gets a share of the peak; zero would waste it.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    if config.schedule == "linear":
        return peak * (1 - done)
    if config.schedule == "cosine":
        return peak * (1 + math.cos(math.pi * done)) / 2
    return peak


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Negative log-likelihood of the supervised tokens, summed, float32.

    Padding needs no mask: it stands at the right, where a causal model cannot look, and is not
    supervised. Logits are computed only at positions that predict a supervised token of some row.
    """
    wanted = batch.supervised[:, 1:]
    positions = wanted.any(dim=0).nonzero().squeeze(1)
    output = model(input_ids=batch.input_ids, use_cache=False, logits_to_keep=positions)
    chosen = wanted[:, positions]
    return F.cross_entropy(
        output.logits[chosen].float(), batch.input_ids[:, 1:][:, positions][chosen], reduction="sum"
    )


class _Trainer:
    """One run's state: parameters, optimiser, position in the data."""

    def __init__(
        self,
        config: TrainConfig,
        base: Base,
        adapted: Mapping[Target, AdaptedLinear],
        examples: Sequence[Example],
        evaluation: Sequence[Example],
        run: RunDirectory,
    ) -> None:
        self.config = config
        self.base = base
        self.run = run
        self.examples = examples
        self.evaluation = evaluation
        self.step = 0
        self.parameters = {
            f"{target}.{name}": factor
            for target, linear in adapted.items()
            for name, factor in linear.factors().items()
        }
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        pad_id = base.tokenizer.pad_token_id
        # What the padding is does not matter (see summed_loss), only that it is in the vocabulary.
        self.pad_id = 0 if pad_id is None else int(pad_id)
        self.fingerprint = self._fingerprint()

    @property
    def num_parameters(self) -> int:
        """Number of trained values."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def restore(self) -> None:
        """Take the run directory's checkpoint, and drop the log lines of steps after it."""
        self.step = load_checkpoint(
            self.run.checkpoint,
            fingerprint=self.fingerprint,
            parameters=self.parameters,
            optimizer=self.optimizer,
        )
        keep_until(self.run.metrics, self.step)
        keep_until(self.run.evals, self.step)

    def write_options(self) -> None:
        """Record what was asked for."""
        asked = {name: _plain(value) for name, value in asdict(self.config).items()}
        record = {"asked": asked, "run": self.fingerprint, "parameters": self.num_parameters}
        text = json.dumps(record, indent=2, sort_keys=True) + "\n"
        write_atomically(self.run.options, [text.encode()])

    def run_steps(self, progress: bool, on_step: OnStep | None) -> bool:
        """Make the remaining updates; False when a signal stopped them early."""
        batches = self._batches()
        started = self.step
        with ExitStack() as stack:
            stop = stack.enter_context(StopRequest())
            metrics = stack.enter_context(JsonLines(self.run.metrics))
            evals = stack.enter_context(JsonLines(self.run.evals)) if self.evaluation else None
            bar = stack.enter_context(
                tqdm(total=self.config.steps, initial=self.step, unit="step", disable=not progress)
            )
            self._report_evaluation(evals)
            while self.step < self.config.steps and not stop.requested:
                done = self._update(next(batches))
                metrics.append(done)
                bar.set_postfix(loss=f"{done.loss:.3f}", tokens_s=f"{done.tokens_s:.0f}")
                bar.update()
                if on_step is not None:
                    on_step(done)
                if self.step % self.config.save_every == 0 and self.step < self.config.steps:
                    self._save(metrics, evals)
            if self.step > started or not self.run.checkpoint.exists():
                self._save(metrics, evals)
        return self.step == self.config.steps

    def _update(self, batches: Sequence[Batch]) -> StepMetrics:
        """One optimiser step over ``accumulate`` batches, averaged over supervised tokens."""
        started = time.perf_counter()
        rate = learning_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        count = sum(batch.num_supervised for batch in batches)
        loss = 0.0
        for batch in batches:
            part = summed_loss(self.base.model, batch) / count
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.item()
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(self.step + 1, loss)
        self.optimizer.step()
        self.step += 1
        seconds = time.perf_counter() - started
        tokens = sum(batch.num_tokens for batch in batches)
        return StepMetrics(self.step, loss, rate, norm, round(tokens / seconds, 1))

    def _batches(self) -> Iterator[list[Batch]]:
        """The batches of each step from the current one on."""
        size = self.config.batch_size
        order = order_of(len(self.examples), self.config.seed)
        skipped = self.step * self.config.accumulate * size
        indices = islice(order, skipped, None)
        while True:
            yield [
                self._collate([self.examples[index] for index in islice(indices, size)])
                for _ in range(self.config.accumulate)
            ]

    def _collate(self, examples: Sequence[Example]) -> Batch:
        return collate(examples, self.pad_id, self.base.device)

    def _report_evaluation(self, evals: JsonLines | None) -> None:
        """Measure and log the loss on the evaluation data, once for each step."""
        if evals is not None and self.step not in {old.step for old in read_evals(self.run.evals)}:
            evals.append(EvalMetrics(self.step, self._evaluate()))
            evals.sync()

    @torch.no_grad()
    def _evaluate(self) -> float:
        size = self.config.batch_size
        total, count = 0.0, 0
        for start in range(0, len(self.evaluation), size):
            batch = self._collate(self.evaluation[start : start + size])
            total += summed_loss(self.base.model, batch).item()
            count += batch.num_supervised
        return total / count

    def _save(self, metrics: JsonLines, evals: JsonLines | None) -> None:
        """Evaluate if asked to, then write a checkpoint; the logs are on disk before it is."""
        self._report_evaluation(evals)
        metrics.sync()
        save_checkpoint(
            self.run.checkpoint,
            step=self.step,
            fingerprint=self.fingerprint,
            parameters=self.parameters,
            optimizer=self.optimizer,
        )

    def _fingerprint(self) -> dict[str, object]:
        """What a resumed run must share with this one."""
        options = asdict(self.config)
        for name in _FREE_OPTIONS:
            del options[name]
        data = hashlib.sha256()
        for example in self.examples:
            data.update(repr(example).encode())
        return {
            **{name: _plain(value) for name, value in options.items()},
            "lr": self.config.learning_rate,
            "base_digest": self.base.digest,
            "data_digest": data.hexdigest(),
        }


def _exact_weights(base: Base) -> WeightOf:
    """The base's weights before they were rounded to what it trains in, read when asked for.

    A basis is shared by everyone with this base, so it must not depend on one run's dtype.
    """
    if next(base.model.parameters()).dtype == torch.float32:
        return weight_reader(base.model)

    @functools.cache
    def exact() -> WeightOf:
        return weight_reader(load_base(base.path, "cpu", "float32").model)

    return lambda target: exact()(target).to(base.device)


def _plain(value: Any) -> object:
    """The value as JSON can say it."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
