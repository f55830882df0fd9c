"""The batches of every step, for all lanes at once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.data import Batch, Example, collate
from shoal.adapters.training.inputs import StepInputs, step_inputs, supervised_per_lane
from shoal.adapters.training.lanes import LaneRun
from shoal.adapters.training.runner import LENGTH_MULTIPLE

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class StepBatches:
    """What one step reads.

    Attributes:
        inputs: one for each forward pass, this process's rows of it.
        tokens: per lane, tokens that are not padding, of all processes.
    """

    inputs: list[StepInputs]
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class Batching:
    """Makes batches.

    Attributes:
        config: sizes, packing, accumulation.
        pad_id: any id of the vocabulary.
        fixed_shapes: round shapes up, so that few occur.
        pinned: put the tensors where a CUDA device reads by itself.
        rows: which rows of each lane's batch are this process's.
    """

    config: TrainConfig
    pad_id: int
    fixed_shapes: bool = False
    pinned: bool = False
    rows: slice | None = None

    def steps(self, lanes: Sequence[LaneRun], done: int) -> Iterator[StepBatches]:
        """The batches of each step after ``done`` steps, endlessly."""
        size, passes = self.config.batch_size, self.config.accumulate
        orders = [lane.rows(self.config, done * passes * size) for lane in lanes]
        while True:
            # Pass after pass, lane after lane, row after row.
            chosen = [[list(islice(order, size)) for order in orders] for _ in range(passes)]
            batches = [self._collate([row for lane in rows for row in lane]) for rows in chosen]
            tokens = [
                sum(len(row.input_ids) for rows in chosen for row in rows[index])
                for index in range(len(lanes))
            ]
            counts = supervised_per_lane(batches, len(lanes))
            yield StepBatches([self._prepare(batch, counts) for batch in batches], tokens)

    def evaluation(
        self, examples: Sequence[Example], lanes: int, *, rank: int = 0, size: int = 1
    ) -> Iterator[StepInputs]:
        """The same rows for every lane; the losses of all of them add up to the mean.

        Args:
            examples: what to measure on.
            lanes: how many.
            rank, size: this process takes every ``size``-th batch, from the ``rank``-th on.
        """
        count = sum(sum(example.supervised[1:]) for example in examples)
        step = self.config.batch_size
        for start in range(rank * step, len(examples), size * step):
            rows = list(examples[start : start + step])
            batch = self._collate(rows * lanes, packed=False)
            yield step_inputs(batch, [count] * lanes)

    def _collate(self, rows: Sequence[Example], *, packed: bool | None = None) -> Batch:
        packed = self.config.pack if packed is None else packed
        multiple = LENGTH_MULTIPLE if self.fixed_shapes else 1
        return collate(rows, self.pad_id, _CPU, packed=packed, multiple=multiple)

    def _prepare(self, batch: Batch, counts: Sequence[int]) -> StepInputs:
        inputs = step_inputs(batch, counts, fixed_shapes=self.fixed_shapes, rows=self.rows)
        return inputs.pinned() if self.pinned else inputs
