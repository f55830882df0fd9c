"""Which rows of a training step belong to which adapter, for the ops that train many at once.

A step is ``rows`` sequences of one padded length. Every row belongs to one lane (an adapter in a
bank) or to none, and the rows of a lane are neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.kernels.errors import ShapeError, check_vector


class LaneRows(NamedTuple):
    """The owners of a step's rows, in both directions.

    Attributes:
        owners: ``(rows,)`` int32, the lane of each row; -1: the row is not used.
        firsts, counts: ``(segments,)`` int32, neighbouring rows of one lane: the first, and how
            many. A count of 0 means that the segment is not used.
        lanes: ``(segments,)`` int32, whose they are; no lane has two segments.
    """

    owners: Tensor
    firsts: Tensor
    counts: Tensor
    lanes: Tensor


def plan_rows(owners: Sequence[int], segments: int) -> tuple[list[int], list[int], list[int]]:
    """``firsts``, ``counts`` and ``lanes`` of ``LaneRows``, padded to ``segments``.

    Raises:
        ValueError: a lane's rows are not neighbours, or there are more lanes than segments.
    """
    firsts: list[int] = []
    counts: list[int] = []
    lanes: list[int] = []
    seen: set[int] = set()
    for row, lane in enumerate(owners):
        if lane < 0:
            continue
        if lanes and lanes[-1] == lane and firsts[-1] + counts[-1] == row:
            counts[-1] += 1
            continue
        if lane in seen:
            raise ValueError(f"the rows of lane {lane} are not neighbours")
        firsts.append(row)
        counts.append(1)
        lanes.append(lane)
        seen.add(lane)
    if len(lanes) > segments:
        raise ValueError(f"{len(lanes)} lanes in {segments} segments")
    padding = [0] * (segments - len(lanes))
    return firsts + padding, counts + padding, lanes + padding


def upload_rows(
    owners: Sequence[int], device: torch.device, segments: int | None = None
) -> LaneRows:
    """Copy a plan to ``device``; ``segments`` defaults to one a row, which always is enough."""
    planned = plan_rows(owners, len(owners) if segments is None else segments)
    table = (list(owners), *planned)
    return LaneRows(*(torch.tensor(part, dtype=torch.int32, device=device) for part in table))


def check_rows(rows: LaneRows, count: int) -> None:
    """Require int32 vectors that fit a step of ``count`` rows.

    Raises:
        ShapeError: names the argument.
    """
    check_vector("rows.owners", rows.owners, (torch.int32,), count)
    check_vector("rows.firsts", rows.firsts, (torch.int32,), None)
    for name in ("counts", "lanes"):
        check_vector(f"rows.{name}", getattr(rows, name), (torch.int32,), rows.firsts.shape[0])


def check_steps(argument: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Require ``(rows, length, modules, width)`` with a contiguous last axis.

    Raises:
        ShapeError: names the argument.
    """
    if tensor.dim() != 4:
        raise ShapeError(argument, "4 axes (rows, length, modules, width)", tuple(tensor.shape))
    if tensor.dtype not in dtypes:
        raise ShapeError(argument, f"a dtype of {dtypes}", tensor.dtype)
    if tensor.shape[3] > 1 and tensor.stride(3) != 1:
        raise ShapeError(argument, "a contiguous last axis", f"strides {tensor.stride()}")
