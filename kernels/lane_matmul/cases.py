"""Inputs of ``lane_matmul`` for its tests and its benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.kernels.testing import random


@dataclass(frozen=True, slots=True)
class Case:
    """One shape of input.

    Attributes:
        owners: the lane of each row, -1 for none.
        lanes: matrices in the bank.
        modules: matrices of a lane, and inputs and outputs of a token.
        transposed: the bank is a transposed view.
        padded: x and out are views with NaN between their tokens, the bank one with NaN between
            its matrices.
    """

    name: str
    owners: tuple[int, ...]
    length: int
    k: int
    n: int
    lanes: int = 3
    modules: int = 1
    transposed: bool = False
    padded: bool = False
    scale: float = 1.0
    add: bool = False
    gpu_only: bool = False

    @property
    def slack(self) -> float:
        """Multiplies the tolerance: many more outputs have rarer extremes."""
        return 3.0 if self.gpu_only else 1.0


CASES = (
    Case("no rows", owners=(), length=4, k=8, n=8),
    Case("one token", owners=(1,), length=1, k=1, n=1),
    Case("core", owners=(0, 0, 2, 1), length=33, k=16, n=16, transposed=True, scale=0.5),
    Case("core back", owners=(2, 0), length=64, k=16, n=16, padded=True, scale=2.0),
    Case("unused rows", owners=(1, -1, 0, -1), length=20, k=9, n=13, padded=True),
    Case("divides nothing", owners=(2, 1), length=35, k=70, n=37, transposed=True, padded=True),
    Case("expand", owners=(0, 1, -1, 2), length=17, k=8, n=150, padded=True, add=True),
    Case("shrink", owners=(2, 2, 0), length=19, k=150, n=8, transposed=True),
    Case(
        "q, k and v", owners=(1, -1, 0), length=18, k=8, n=8, modules=3, transposed=True,
        padded=True, scale=0.5,
    ),
    Case("large core", owners=(1, 0), length=18, k=96, n=96, scale=0.25),
    Case(
        "fleet", owners=tuple(range(64)), length=128, k=16, n=4096, lanes=64, add=True,
        gpu_only=True,
    ),
    Case(
        "fleet core", owners=tuple(range(512)), length=128, k=64, n=64, lanes=512, transposed=True,
        gpu_only=True,
    ),
)  # fmt: skip


class Inputs(NamedTuple):
    """Arguments of ``lane_matmul``."""

    x: Tensor
    bank: Tensor
    owners: Tensor
    out: Tensor


def spread(values: Tensor, gap: int = 3) -> Tensor:
    """A view equal to ``values`` with NaN behind the last axis."""
    buffer = values.new_full((*values.shape[:-1], values.shape[-1] + gap), float("nan"))
    view = buffer[..., : values.shape[-1]]
    view.copy_(values)
    return view


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Random inputs whose products have magnitude about one; unused rows of x are NaN."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(case.owners)
    x = random((rows, case.length, case.modules, case.k), generator, dtype)
    owners = torch.tensor(case.owners, dtype=torch.int32)
    x[owners < 0] = float("nan")
    shape = (case.n, case.k) if case.transposed else (case.k, case.n)
    bank = random((case.lanes, case.modules, *shape), generator, torch.float32, case.k**-0.5)
    out = random((rows, case.length, case.modules, case.n), generator, dtype)
    x, bank, out, owners = (tensor.to(device) for tensor in (x, bank, out, owners))
    if case.padded:
        x, bank, out = spread(x), spread(bank), spread(out)
    return Inputs(x, bank.mT if case.transposed else bank, owners, out)
