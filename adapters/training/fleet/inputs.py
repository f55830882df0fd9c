"""A step's rows as tensors: made on the host, of shapes that do not depend on what is in them.

With fixed shapes the rows are padded to the step's budget, lengths and places to learn to few
sizes, so that a recorded step can be replayed with other tenants and other data.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.adapters.training.data import Example
from shoal.kernels.lane_rows import LaneRows, plan_rows

Ints = NDArray[np.int64]

# Where shapes are fixed, lengths are padded to a multiple, rows and places to powers of two.
LENGTH_MULTIPLE = 64
ROWS_MIN = 8
PLACES_MIN = 256


@dataclass(frozen=True, slots=True)
class Row:
    """An example, ready to be copied into a batch.

    Attributes:
        ids: ``(length,)``.
        places: positions whose next token is to be learnt.
    """

    ids: Ints
    places: Ints

    @classmethod
    def of(cls, example: Example) -> Self:
        """Convert once what is used in every epoch."""
        ids = np.asarray(example.input_ids, dtype=np.int64)
        places = np.flatnonzero(np.asarray(example.supervised[1:], dtype=bool))
        return cls(ids, places.astype(np.int64))


@dataclass(frozen=True, slots=True)
class FleetInputs:
    """One step.

    Attributes:
        input_ids: ``(rows, length)`` int64.
        owners, firsts, counts, lanes: see ``LaneRows``; int32.
        positions: ``(places,)`` int64, index into the flattened ``input_ids``.
        labels: ``(places,)`` int64, the token that follows.
        weights: ``(places,)`` float32: 1 / places of the lane; 0 where a place only fills up.
        place_lanes: ``(places,)`` int64, whose place it is; those that fill up are in the first
            row, and its lane's.
        active: ``(bank lanes,)`` bool, who is in the step.
        lr: ``(bank lanes,)`` float64.
    """

    input_ids: Tensor
    owners: Tensor
    firsts: Tensor
    counts: Tensor
    lanes: Tensor
    positions: Tensor
    labels: Tensor
    weights: Tensor
    place_lanes: Tensor
    active: Tensor
    lr: Tensor

    @property
    def key(self) -> tuple[int, ...]:
        """What a recorded step depends on: rows, length, places."""
        return (*self.input_ids.shape, self.positions.shape[0])

    def rows(self) -> LaneRows:
        """Which row is whose."""
        return LaneRows(self.owners, self.firsts, self.counts, self.lanes)

    def tensors(self) -> list[Tensor]:
        """All of them, in a fixed order."""
        return [getattr(self, spec.name) for spec in fields(self)]

    def to(self, device: torch.device) -> Self:
        """A copy there, unless it is there."""
        return type(self)(*(tensor.to(device, non_blocking=True) for tensor in self.tensors()))

    def pinned(self) -> Self:
        """A copy in memory that a CUDA device reads by itself."""
        return type(self)(*(tensor.pin_memory() for tensor in self.tensors()))


def fleet_inputs(
    parts: Sequence[tuple[int, Sequence[Row]]],
    bank_lanes: int,
    *,
    rates: Sequence[float] | None = None,
    most_rows: int | None = None,
) -> FleetInputs:
    """Put the tenants' rows one below the other.

    Args:
        parts: lane and rows of each tenant; no lane twice, at least one row in all.
        bank_lanes: lanes of the bank.
        rates: learning rate of each tenant, in the order of ``parts``.
        most_rows: of a step; pad rows and everything else to one of few sizes. None: as small as
            can be.
    """
    rows = [row for _, own in parts for row in own]
    owners = [lane for lane, own in parts for _ in own]
    length = max(len(row.ids) for row in rows)
    height = len(rows)
    if most_rows is not None:
        length += -length % LENGTH_MULTIPLE
        height = min(most_rows, max(ROWS_MIN, _power_of_two(height)))
        owners += [-1] * (height - len(rows))
    # What the padding is does not matter, only that it is in the vocabulary.
    ids = np.zeros((height, length), dtype=np.int64)
    for at, row in enumerate(rows):
        ids[at, : len(row.ids)] = row.ids
    positions = np.concatenate([row.places + at * length for at, row in enumerate(rows)])
    labels = ids.reshape(-1)[positions + 1]
    learnt = [sum(len(row.places) for row in own) for _, own in parts]
    lanes = np.asarray([lane for lane, _ in parts], dtype=np.int64)
    place_lanes = np.repeat(lanes, learnt)
    weights = np.repeat(1.0 / np.maximum(learnt, 1), learnt).astype(np.float32)
    if most_rows is not None:
        more = max(PLACES_MIN, _power_of_two(len(positions))) - len(positions)
        positions, labels, weights = (np.pad(x, (0, more)) for x in (positions, labels, weights))
        place_lanes = np.pad(place_lanes, (0, more), constant_values=owners[0])
    active = np.zeros(bank_lanes, dtype=bool)
    active[lanes] = True
    lr = np.zeros(bank_lanes)
    lr[lanes] = 0.0 if rates is None else rates
    table = (owners, *plan_rows(owners, height))
    return FleetInputs(
        torch.from_numpy(ids),
        *(torch.tensor(part, dtype=torch.int32) for part in table),
        *(torch.from_numpy(x) for x in (positions, labels, weights, place_lanes, active, lr)),
    )


def _power_of_two(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def loss_by_lane(inputs: FleetInputs, nll: Tensor) -> dict[int, float]:
    """Each lane's mean loss of a step, added up on the host in the order of the places.

    Args:
        inputs: the step, on the CPU.
        nll: ``(places,)`` on the CPU.
    """
    parts = nll.double().numpy() * inputs.weights.double().numpy()
    lanes = inputs.place_lanes.numpy()
    sums = np.bincount(lanes, weights=parts, minlength=len(inputs.active))
    return {int(lane): float(sums[lane]) for lane in np.flatnonzero(inputs.active.numpy())}
