"""Inputs of ``fold_sum`` for its tests and its benchmark."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.testing import poisoned_rows, random


@dataclass(frozen=True, slots=True)
class Case:
    """One shape of input; ``strided``: x is a view with NaN around its rows."""

    name: str
    tokens: int
    width: int
    rank: int
    strided: bool = False
    gpu_only: bool = False

    @property
    def slack(self) -> float:
        """Multiplies the tolerance: 10⁸ outputs, or sums of 10⁴ terms, have rarer extremes."""
        return 3.0 if self.gpu_only else 1.0


CASES = (
    Case("empty", tokens=0, width=64, rank=8),
    Case("one row", tokens=1, width=64, rank=8),
    Case("rank one", tokens=3, width=77, rank=1),
    Case("rank divides", tokens=9, width=256, rank=16, strided=True),
    Case("divides nothing", tokens=7, width=123, rank=5, strided=True),
    Case("rank above width", tokens=4, width=9, rank=33, strided=True),
    Case("several steps", tokens=3, width=9001, rank=48, strided=True),
    Case("largest", tokens=8192, width=14336, rank=48, strided=True, gpu_only=True),
)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Random x, scaled so that the sums have magnitude about one."""
    generator = torch.Generator().manual_seed(seed)
    terms = max(1.0, case.width / case.rank)
    x = random((case.tokens, case.width), generator, dtype, terms**-0.5).to(device)
    return poisoned_rows(x) if case.strided else x
