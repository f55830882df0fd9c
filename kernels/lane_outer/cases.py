"""Inputs of ``lane_outer`` for its tests and its benchmark."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.kernels.lane_matmul.cases import spread
from shoal.kernels.lane_rows import LaneRows, upload_rows
from shoal.kernels.testing import random


@dataclass(frozen=True, slots=True)
class Case:
    """One shape of input.

    Attributes:
        owners: the lane of each row, -1 for none.
        lanes: those that are written to.
        modules: matrices of a lane.
        padded: a, b and grads are views with NaN between their rows.
    """

    name: str
    owners: tuple[int, ...]
    length: int
    m: int
    n: int
    lanes: int = 4
    modules: int = 1
    padded: bool = False
    scale: float = 1.0
    gpu_only: bool = False

    @property
    def slack(self) -> float:
        """Multiplies the tolerance: many outputs have rarer extremes, long sums larger errors."""
        longest = max(Counter(self.owners).values(), default=0) * self.length
        return (3.0 if self.gpu_only else 1.0) * max(1.0, math.sqrt(longest / 8192))


CASES = (
    Case("no rows", owners=(), length=4, m=8, n=8),
    Case("one token", owners=(1,), length=1, m=1, n=1),
    Case("a row each", owners=(3, 0, 1), length=33, m=16, n=16, scale=0.5),
    Case("two rows each", owners=(2, 2, 0, 0), length=20, m=16, n=16, padded=True),
    Case("ragged", owners=(1, 1, 1, -1, 0, 2, 2), length=70, m=5, n=13, padded=True, scale=2.0),
    Case("many rows", owners=(0,) * 9 + (2,) * 4, length=16, m=8, n=8),
    Case("q, k and v", owners=(3, 3, 1), length=18, m=8, n=9, modules=3, padded=True),
    Case("fold", owners=(2, 0, -1), length=19, m=8, n=150, padded=True),
    Case("large core", owners=(1, 0, 0), length=18, m=66, n=70),
    Case(
        "fleet", owners=tuple(range(64)), length=128, m=16, n=4096, lanes=64, gpu_only=True
    ),
    Case(
        "few lanes", owners=(0,) * 100 + (1,) * 28, length=512, m=64, n=64, gpu_only=True
    ),
)  # fmt: skip


class Inputs(NamedTuple):
    """Arguments of ``lane_outer``."""

    a: Tensor
    b: Tensor
    rows: LaneRows
    grads: Tensor


def make_inputs(
    case: Case, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device, seed: int
) -> Inputs:
    """Random inputs whose sums have magnitude about one; unused rows are NaN."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(case.owners)
    most = max((case.owners.count(lane) for lane in range(case.lanes)), default=0)
    terms = max(1, most * case.length)
    a = random((rows, case.length, case.modules, case.m), generator, dtypes[0], terms**-0.25)
    b = random((rows, case.length, case.modules, case.n), generator, dtypes[1], terms**-0.25)
    unused = torch.tensor(case.owners, dtype=torch.int32) < 0
    a[unused] = b[unused] = float("nan")
    grads = random((case.lanes, case.modules, case.m, case.n), generator, torch.float32)
    a, b, grads = (tensor.to(device) for tensor in (a, b, grads))
    if case.padded:
        a, b, grads = spread(a), spread(b), spread(grads)
    return Inputs(a, b, upload_rows(case.owners, device), grads)
