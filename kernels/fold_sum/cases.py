"""Inputs of ``fold_sum`` for its tests and its benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.kernels.testing import poisoned_rows, random


@dataclass(frozen=True, slots=True)
class Case:
    """One shape of input.

    Attributes:
        ranks: the tokens' ranks, by turns; 0: the token is left out.
        columns: of the result; the largest rank or more.
        strided: x is a view with NaN around its rows.
    """

    name: str
    tokens: int
    width: int
    ranks: tuple[int, ...]
    columns: int
    strided: bool = False
    gpu_only: bool = False

    @property
    def slack(self) -> float:
        """Multiplies the tolerance: 10⁸ outputs, or sums of 10⁴ terms, have rarer extremes."""
        return 3.0 if self.gpu_only else 1.0


CASES = (
    Case("empty", tokens=0, width=64, ranks=(8,), columns=8),
    Case("one row", tokens=1, width=64, ranks=(8,), columns=8),
    Case("rank one", tokens=3, width=77, ranks=(1,), columns=1),
    Case("rank divides", tokens=9, width=256, ranks=(16,), columns=16, strided=True),
    Case("divides nothing", tokens=7, width=123, ranks=(5,), columns=5, strided=True),
    Case("rank above width", tokens=4, width=9, ranks=(33,), columns=64, strided=True),
    Case("several steps", tokens=3, width=9001, ranks=(48,), columns=64, strided=True),
    Case("halved", tokens=9, width=301, ranks=(64, 32, 8, 4, 1), columns=64, strided=True),
    Case("all kinds", tokens=16, width=300, ranks=(16, 0, 4, 12, 3, 0, 7), columns=16),
    Case("no power of two", tokens=8, width=300, ranks=(16, 12, 24, 0), columns=24, strided=True),
    Case(
        "largest", tokens=8192, width=14336, ranks=(64, 48, 16, 0), columns=64, strided=True,
        gpu_only=True,
    ),
)  # fmt: skip


class Inputs(NamedTuple):
    """Arguments of ``fold_sum``."""

    x: Tensor
    ranks: Tensor
    columns: int


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Random x, scaled so that the sums have magnitude about one."""
    generator = torch.Generator().manual_seed(seed)
    own = [case.ranks[t % len(case.ranks)] for t in range(case.tokens)]
    ranks = torch.tensor(own, dtype=torch.int32)
    scale = torch.tensor([max(1.0, case.width / max(rank, 1)) ** -0.5 for rank in own])
    x = random((case.tokens, case.width), generator, torch.float32)
    x = (x * scale[:, None]).to(dtype).to(device)
    return Inputs(poisoned_rows(x) if case.strided else x, ranks.to(device), case.columns)


def used_part(folded: Tensor, ranks: Tensor) -> Tensor:
    """``folded`` with zeros beyond each token's rank, where anything may be."""
    beyond = torch.arange(folded.shape[1], device=folded.device) >= ranks[:, None]
    return folded.masked_fill(beyond, 0.0)
