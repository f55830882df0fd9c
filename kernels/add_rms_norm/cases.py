"""Inputs of ``add_rms_norm`` for its tests and its benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.kernels.add_rms_norm.kernel import NormConfig
from shoal.kernels.core_apply.epilogue import CoreEpilogue
from shoal.kernels.core_apply.epilogue_cases import CoreCase, widen
from shoal.kernels.testing import poisoned_rows, random


@dataclass(frozen=True, slots=True)
class Case:
    """One shape of input; rows are views with NaN around them."""

    name: str
    tokens: int
    n: int
    norm_only: bool = False
    branch: bool = False
    bias: bool = False
    sandwich: bool = False
    plus_one: bool = False
    core: CoreCase | None = None
    config: NormConfig | None = None
    gpu_only: bool = False

    @property
    def slack(self) -> float:
        """Multiplies the tolerance: 10⁷ outputs have rarer extremes."""
        return 3.0 if self.gpu_only else 1.0


MIXED = CoreCase(
    columns=29, ranks=(1, 29, 7, 16), adapters=5, bare_every=4, gap=3, matrix=1, rank_major=False
)
ALIGNED = CoreCase(
    columns=32, ranks=(8, 16, 16), firsts=(0, 16, 8), adapters=4, bare_every=3, alignment=8
)
SMALL = CoreCase(columns=4, ranks=(4,), adapters=1)
CASES = (
    Case("empty", tokens=0, n=8),
    Case("norm only", tokens=3, n=75, norm_only=True, plus_one=True),
    Case("one row", tokens=1, n=64),
    Case("divides nothing", tokens=5, n=131, branch=True, bias=True),
    Case("sandwich", tokens=3, n=48, sandwich=True, bias=True, plus_one=True),
    Case("one row, core", tokens=1, n=96, core=SMALL),
    Case("all bare, core", tokens=2, n=20, core=CoreCase(8, (8,), 1, bare_every=1)),
    Case("mixed ranks, core", tokens=7, n=131, branch=True, bias=True, sandwich=True, core=MIXED),
    Case("shared columns, core", tokens=6, n=96, core=ALIGNED),
    Case("rows share a program, core", tokens=7, n=96, core=MIXED, config=NormConfig(4, 4)),
    Case("more than one warp, core", tokens=3, n=1027, core=ALIGNED, config=NormConfig(2, 4)),
    Case(
        "largest", tokens=4096, n=16384, gpu_only=True,
        core=CoreCase(columns=32, ranks=(16, 32, 7), adapters=300, bare_every=9),
    ),
)  # fmt: skip


class Inputs(NamedTuple):
    """Arguments of ``add_rms_norm``, in the reference's order."""

    residual: Tensor
    weight: Tensor
    eps: float
    delta: Tensor | None
    branch: Tensor | None
    bias: Tensor | None
    delta_weight: Tensor | None
    plus_one: bool
    core: CoreEpilogue | None


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Random inputs of magnitude about one; see ``epilogue_cases.widen`` for the poison."""
    generator = torch.Generator().manual_seed(seed)

    def rows() -> Tensor:
        return random((case.tokens, case.n), generator, dtype).to(device)

    def norm_weight() -> Tensor:
        noise = random((case.n,), generator, torch.float32, 0.1).to(device)
        return noise if case.plus_one else noise + 1.0

    delta, core = widen(rows(), case.core, (case.n,), generator)
    return Inputs(
        poisoned_rows(rows()),
        norm_weight(),
        1e-5,
        None if case.norm_only else delta,
        poisoned_rows(rows()) if case.branch else None,
        random((case.n,), generator, dtype).to(device) if case.bias else None,
        norm_weight() if case.sandwich else None,
        case.plus_one,
        core,
    )
