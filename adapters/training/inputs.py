"""``StepInputs``: one forward pass's batch as tensors of a fixed shape.

A CUDA graph is recorded for shapes, so what varies from batch to batch is padded here: lengths to a
multiple, and the places to be learnt to a capacity. Made on the host, where counting is free.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.adapters.training.data import Batch

# What a place where something is learnt costs, in tokens of a row: the last linear against the
# layers. Of small bases, where it matters; larger ones have relatively smaller vocabularies.
_PLACE_COST = 0.3


class Shape(NamedTuple):
    """Of a batch: rows of all lanes, their length, lanes, places per lane, packed or not."""

    rows: int
    length: int
    lanes: int
    capacity: int
    packed: bool

    @property
    def rows_per_lane(self) -> int:
        """Equally many of each."""
        return self.rows // self.lanes

    @property
    def cost(self) -> float:
        """How long a step of it takes, in tokens."""
        return self.rows * self.length + _PLACE_COST * self.lanes * self.capacity

    def holds(self, other: "Shape") -> bool:
        """Whether a batch of the other shape can be padded to this one."""
        return (
            (self.rows, self.lanes, self.packed) == (other.rows, other.lanes, other.packed)
            and self.length >= other.length
            and self.capacity >= other.capacity
        )


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Rows of all lanes, those of lane 0 first, and what is learnt of them.

    A place is a token and what follows it: the logits at ``positions`` are to predict ``labels``.
    Places that only fill the capacity have weight 0 and point into a row of their own lane, so that
    a lane that is not finite stays alone.

    Attributes:
        input_ids: ``(lanes · rows, length)`` int64.
        positions: ``(lanes, capacity)`` int64, index into the flattened ``input_ids``.
        labels: ``(lanes, capacity)`` int64.
        weights: ``(lanes, capacity)`` float32: 1 / supervised tokens of the lane's whole step.
        position_ids: ``(lanes · rows, length)`` int64; None when not packed.
        segments: ``(lanes · rows, length)`` int64; None when not packed.
    """

    input_ids: Tensor
    positions: Tensor
    labels: Tensor
    weights: Tensor
    position_ids: Tensor | None = None
    segments: Tensor | None = None

    @property
    def shape(self) -> "Shape":
        """What a recorded step depends on."""
        rows, length = self.input_ids.shape
        lanes, capacity = self.positions.shape
        return Shape(rows, length, lanes, capacity, self.segments is not None)

    def padded(self, length: int, capacity: int) -> Self:
        """The same batch in a larger shape."""
        own = self.shape
        right = (0, length - own.length)
        more = (0, capacity - own.capacity)
        row, column = self.positions // own.length, self.positions % own.length
        positions = F.pad(row * length + column, more)
        # What fills up points into its own lane's first row, as everywhere.
        positions[:, own.capacity :] = (torch.arange(own.lanes) * own.rows_per_lane * length)[
            :, None
        ]
        return type(self)(
            input_ids=F.pad(self.input_ids, right),
            positions=positions,
            labels=F.pad(self.labels, more),
            weights=F.pad(self.weights, more),
            position_ids=None if self.position_ids is None else F.pad(self.position_ids, right),
            segments=None if self.segments is None else F.pad(self.segments, right),
        )

    def tensors(self) -> list[Tensor]:
        """Those that there are, in a fixed order."""
        values = (getattr(self, spec.name) for spec in fields(self))
        return [value for value in values if value is not None]

    def to(self, device: torch.device) -> Self:
        """A copy there; from a CUDA host's pinned memory it does not wait."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Self:
        """A copy in memory that a CUDA device reads by itself."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {}
        for spec in fields(self):
            value = getattr(self, spec.name)
            changed[spec.name] = None if value is None else change(value)
        return type(self)(**changed)


def step_inputs(
    batch: Batch, counts: Sequence[int], *, fixed_shapes: bool = False, rows: slice | None = None
) -> StepInputs:
    """Prepare a batch for the device.

    Args:
        batch: on the CPU, rows sorted by lane, equally many of each.
        counts: per lane, the supervised tokens of the whole step; the weights add up to 1 over it.
        fixed_shapes: round the capacity up to a power of two, so that few shapes occur.
        rows: which rows of each lane to take; None: all.
    """
    lanes = len(counts)
    input_ids, supervised = (_of_lanes(x, lanes, rows) for x in (batch.input_ids, batch.supervised))
    _, per_lane, length = input_ids.shape
    # The first token of a row has nothing before it that could predict it.
    lane, row, column = supervised[:, :, 1:].nonzero(as_tuple=True)
    found = torch.bincount(lane, minlength=lanes)
    capacity = max(1, int(found.max()))
    if fixed_shapes:
        capacity = max(64, 1 << (capacity - 1).bit_length())
    own_row = torch.arange(lanes)[:, None] * per_lane * length
    positions = own_row.expand(lanes, capacity).clone()
    labels = torch.zeros((lanes, capacity), dtype=torch.int64)
    weights = torch.zeros((lanes, capacity))
    place = torch.arange(len(lane)) - (found.cumsum(0) - found)[lane]
    positions[lane, place] = (lane * per_lane + row) * length + column
    labels[lane, place] = input_ids[lane, row, column + 1]
    weights[lane, place] = (1.0 / torch.tensor(counts, dtype=torch.float32).clamp(min=1))[lane]
    return StepInputs(
        input_ids=input_ids.flatten(0, 1),
        positions=positions,
        labels=labels,
        weights=weights,
        position_ids=_flat(batch.position_ids, lanes, rows),
        segments=_flat(batch.segments, lanes, rows),
    )


def supervised_per_lane(batches: Sequence[Batch], lanes: int) -> list[int]:
    """Tokens that each lane learns from the batches together."""
    total = torch.zeros(lanes, dtype=torch.int64)
    for batch in batches:
        total += batch.supervised[:, 1:].reshape(lanes, -1).sum(dim=1)
    return [int(count) for count in total]


def _of_lanes(x: Tensor, lanes: int, rows: slice | None) -> Tensor:
    """``(lanes · rows, length)`` -> ``(lanes, chosen rows, length)``."""
    apart = x.view(lanes, -1, x.shape[1])
    return apart if rows is None else apart[:, rows]


def _flat(x: Tensor | None, lanes: int, rows: slice | None) -> Tensor | None:
    return None if x is None else _of_lanes(x, lanes, rows).flatten(0, 1).contiguous()
