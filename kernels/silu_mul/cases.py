"""Inputs of ``silu_mul`` for its tests and its benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.kernels.core_apply.epilogue import CoreEpilogue
from shoal.kernels.core_apply.epilogue_cases import CoreCase, widen
from shoal.kernels.silu_mul.reference import Activation
from shoal.kernels.testing import random


@dataclass(frozen=True, slots=True)
class Case:
    """One shape of input; rows are views with NaN around them."""

    name: str
    tokens: int
    width: int
    activation: Activation = "silu"
    bias: bool = False
    core: CoreCase | None = None
    gpu_only: bool = False

    @property
    def slack(self) -> float:
        """Multiplies the tolerance: 10⁷ outputs have rarer extremes."""
        return 3.0 if self.gpu_only else 1.0


MIXED = CoreCase(
    columns=29, ranks=(1, 29, 7, 16), adapters=9, bare_every=5, gap=3, matrix=2, rank_major=False
)
ALIGNED = CoreCase(
    columns=32, ranks=(8, 16, 16), firsts=(0, 16, 8), adapters=7, bare_every=4, alignment=8
)
CASES = (
    Case("empty", tokens=0, width=8),
    Case("one row", tokens=1, width=16),
    Case("divides nothing", tokens=5, width=131, bias=True),
    Case("tanh GELU", tokens=3, width=33, activation="gelu_tanh"),
    Case("exact GELU", tokens=3, width=33, activation="gelu", bias=True),
    Case("one row, core", tokens=1, width=48, core=CoreCase(columns=4, ranks=(4,), adapters=1)),
    Case(
        "all bare, core", tokens=3, width=20,
        core=CoreCase(columns=8, ranks=(8,), adapters=1, bare_every=1),
    ),
    Case("mixed ranks, core", tokens=21, width=131, bias=True, core=MIXED),
    Case("shared columns, core", tokens=18, width=96, activation="gelu_tanh", core=ALIGNED),
    Case(
        "largest", tokens=2048, width=14336, gpu_only=True,
        core=CoreCase(columns=32, ranks=(16, 32, 7), adapters=300, bare_every=9),
    ),
)  # fmt: skip


class Inputs(NamedTuple):
    """Arguments of ``silu_mul``, in the reference's order."""

    gate_up: Tensor
    width: int
    activation: Activation
    bias: Tensor | None
    core: CoreEpilogue | None


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Random inputs of magnitude about one; see ``epilogue_cases.widen`` for the poison."""
    generator = torch.Generator().manual_seed(seed)
    y0 = random((case.tokens, 2 * case.width), generator, dtype).to(device)
    gate_up, core = widen(y0, case.core, (case.width, case.width), generator)
    bias = random((2 * case.width,), generator, dtype).to(device) if case.bias else None
    return Inputs(gate_up, case.width, case.activation, bias, core)
