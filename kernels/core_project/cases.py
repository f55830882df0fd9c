"""Inputs of ``core_project`` and ``core_mix`` for their tests and their benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.kernels.core_apply.epilogue import CoreRows
from shoal.kernels.core_apply.epilogue_cases import (
    ALIGNED,
    BARE,
    LARGEST,
    MADE,
    MIXED_RANKS,
    SMALL,
    CoreCase,
    chunked,
    make_rows,
)
from shoal.kernels.testing import poisoned_rows, random


@dataclass(frozen=True, slots=True)
class Case:
    """One shape of input; ``gap`` columns lie before h (``core_mix``)."""

    name: str
    tokens: int
    k: int
    modules: int
    core: CoreCase
    gpu_only: bool = False

    @property
    def slack(self) -> float:
        """Multiplies the tolerance: 10⁷ outputs have rarer extremes."""
        return 3.0 if self.gpu_only else 1.0


CASES = (
    Case("empty", tokens=0, k=8, modules=1, core=SMALL),
    Case("one row", tokens=1, k=64, modules=1, core=SMALL),
    Case("all bare", tokens=2, k=128, modules=2, core=BARE),
    Case("mixed ranks", tokens=37, k=331, modules=2, core=MIXED_RANKS),
    Case("shared columns", tokens=18, k=1100, modules=3, core=ALIGNED),
    Case("64 columns", tokens=19, k=300, modules=2, core=MADE),
    Case("largest", tokens=4096, k=4096, modules=2, core=LARGEST, gpu_only=True),
)


class ProjectInputs(NamedTuple):
    """Arguments of ``core_project``, in the reference's order."""

    x: Tensor
    projection: Tensor
    rows: CoreRows
    modules: int
    matrix: int


class MixInputs(NamedTuple):
    """Arguments of ``core_mix``, in the reference's order."""

    y: Tensor
    h_column: int
    rows: CoreRows
    modules: int
    matrix: int


def make_project_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, seed: int
) -> ProjectInputs:
    """Random inputs whose results have magnitude about one, with NaN around x and A."""
    generator = torch.Generator().manual_seed(seed)
    rows, _ = make_rows(case.core, case.tokens, case.modules, dtype, device, generator)
    x = random((case.tokens, case.k), generator, dtype)
    a = random((case.modules * case.core.columns, case.k), generator, dtype, case.k**-0.5)
    return ProjectInputs(
        poisoned_rows(x.to(device)),
        poisoned_rows(a.to(device)),
        rows,
        case.modules,
        case.core.matrix,
    )


def make_mix_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> MixInputs:
    """Random inputs whose results have magnitude about one, with NaN in what h does not use."""
    generator = torch.Generator().manual_seed(seed)
    tokens, modules = case.tokens, case.modules
    rows, used = make_rows(case.core, tokens, modules, dtype, device, generator)
    h = random((tokens, modules, case.core.columns), generator, dtype)
    h = chunked(h.masked_fill(~used[:, None], float("nan")))
    before = torch.full((tokens, 5), float("nan"), dtype=dtype)
    y = poisoned_rows(torch.cat((before, h), dim=1).to(device))
    return MixInputs(y, 5, rows, modules, case.core.matrix)
