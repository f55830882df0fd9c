"""Inputs of ``add_residual`` for its tests and its benchmark."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.kernels.core_apply.epilogue import Epilogue
from shoal.kernels.core_apply.epilogue_cases import (
    ALIGNED,
    BARE,
    LARGEST,
    MADE,
    MIXED_RANKS,
    SMALL,
    CoreCase,
    widen,
)
from shoal.kernels.testing import poisoned_rows, random


@dataclass(frozen=True, slots=True)
class Case:
    """One shape of input; rows are views with NaN around them."""

    name: str
    tokens: int
    n: int
    start: bool = False
    bias: bool = False
    core: CoreCase | None = None
    gpu_only: bool = False

    @property
    def slack(self) -> float:
        """Multiplies the tolerance: 10⁷ outputs have rarer extremes."""
        return 3.0 if self.gpu_only else 1.0


CASES = (
    Case("empty", tokens=0, n=8),
    Case("start", tokens=3, n=75, start=True),
    Case("one row", tokens=1, n=64),
    Case("divides nothing", tokens=5, n=531, bias=True),
    Case("one row, core", tokens=1, n=96, core=SMALL),
    Case("all bare, core", tokens=2, n=20, core=BARE),
    Case("mixed ranks, core", tokens=37, n=331, bias=True, core=MIXED_RANKS),
    Case("shared columns, core", tokens=18, n=512, core=ALIGNED),
    Case("already mixed, core", tokens=19, n=300, bias=True, core=MADE),
    Case("more than 16 parts of 256", tokens=2, n=4100, core=ALIGNED),
    Case("largest", tokens=4096, n=16384, gpu_only=True, core=LARGEST),
    Case("largest, already mixed", 4096, 8192, gpu_only=True, core=replace(LARGEST, splits=2)),
)


class Inputs(NamedTuple):
    """Arguments of ``add_residual``."""

    residual: Tensor
    delta: Tensor | None
    weight: Tensor
    bias: Tensor | None
    core: Epilogue | None


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Random inputs of magnitude about one; see ``epilogue_cases.widen`` for the poison."""
    generator = torch.Generator().manual_seed(seed)

    def rows() -> Tensor:
        return random((case.tokens, case.n), generator, dtype).to(device)

    delta, core = widen(rows(), case.core, (case.n,), generator)
    return Inputs(
        poisoned_rows(rows()),
        None if case.start else delta,
        random((case.n,), generator, torch.float32, 0.1).to(device) + 1.0,
        random((case.n,), generator, dtype).to(device) if case.bias else None,
        core,
    )
