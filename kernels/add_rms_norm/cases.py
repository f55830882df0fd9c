"""Inputs of ``add_rms_norm`` for its tests and its benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

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
    gpu_only: bool = False

    @property
    def slack(self) -> float:
        """Multiplies the tolerance: 10⁷ outputs have rarer extremes."""
        return 3.0 if self.gpu_only else 1.0


CASES = (
    Case("empty", tokens=0, n=8),
    Case("norm only", tokens=3, n=75, norm_only=True, plus_one=True),
    Case("one row", tokens=1, n=64),
    Case("divides nothing", tokens=5, n=131, branch=True, bias=True),
    Case("sandwich", tokens=3, n=48, sandwich=True, bias=True, plus_one=True),
    Case("everything", tokens=3, n=1027, branch=True, bias=True, sandwich=True),
    Case("largest", tokens=4096, n=16384, gpu_only=True),
)


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


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Random inputs of magnitude about one."""
    generator = torch.Generator().manual_seed(seed)

    def rows() -> Tensor:
        return random((case.tokens, case.n), generator, dtype).to(device)

    def norm_weight() -> Tensor:
        noise = random((case.n,), generator, torch.float32, 0.1).to(device)
        return noise if case.plus_one else noise + 1.0

    return Inputs(
        poisoned_rows(rows()),
        norm_weight(),
        1e-5,
        None if case.norm_only else poisoned_rows(rows()),
        poisoned_rows(rows()) if case.branch else None,
        random((case.n,), generator, dtype).to(device) if case.bias else None,
        norm_weight() if case.sandwich else None,
        case.plus_one,
    )
