"""Inputs of ``silu_mul`` for its tests and its benchmark."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.kernels.core_apply.epilogue import Epilogue, RowScale
from shoal.kernels.core_apply.epilogue_cases import (
    ALIGNED,
    BARE,
    LARGEST,
    MADE,
    MIXED_RANKS,
    SMALL,
    CoreCase,
    make_scale,
    widen,
)
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
    parts: int = 0
    gpu_only: bool = False

    @property
    def slack(self) -> float:
        """Multiplies the tolerance: 10⁷ outputs have rarer extremes."""
        return 3.0 if self.gpu_only else 1.0


CASES = (
    Case("empty", tokens=0, width=8),
    Case("one row", tokens=1, width=16),
    Case("divides nothing", tokens=5, width=131, bias=True, parts=1),
    Case("tanh GELU", tokens=3, width=33, activation="gelu_tanh"),
    Case("exact GELU", tokens=3, width=33, activation="gelu", bias=True),
    Case("one row, core", tokens=1, width=48, core=SMALL, parts=16),
    Case("all bare, core", tokens=3, width=20, core=BARE),
    Case("mixed ranks, core", tokens=21, width=131, bias=True, core=MIXED_RANKS, parts=3),
    Case("shared columns, core", tokens=18, width=96, activation="gelu_tanh", core=ALIGNED),
    Case("already mixed, core", tokens=19, width=131, core=MADE, parts=5),
    Case("largest", tokens=2048, width=14336, gpu_only=True, core=LARGEST, parts=16),
    Case("largest, already mixed", 2048, 14336, gpu_only=True, core=replace(LARGEST, splits=2)),
)


class Inputs(NamedTuple):
    """Arguments of ``silu_mul``, in the reference's order."""

    gate_up: Tensor
    width: int
    activation: Activation
    bias: Tensor | None
    core: Epilogue | None
    scale: RowScale | None


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Random inputs of magnitude about one; see ``epilogue_cases.widen`` for the poison."""
    generator = torch.Generator().manual_seed(seed)
    y0 = random((case.tokens, 2 * case.width), generator, dtype).to(device)
    gate_up, core = widen(y0, case.core, (case.width, case.width), generator)
    bias = random((2 * case.width,), generator, dtype).to(device) if case.bias else None
    scale = make_scale(case.parts, case.tokens, device, generator)
    return Inputs(gate_up, case.width, case.activation, bias, core, scale)
