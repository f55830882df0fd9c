"""Inputs of ``scale_outputs`` for its tests and its benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.kernels.testing import poisoned_arena, poisoned_rows, random


@dataclass(frozen=True, slots=True)
class Case:
    """One shape of input; y is a view with NaN around its rows.

    Attributes:
        owners: the tokens' adapters, by turns; -1: none.
        alignment: of the records and of what precedes the entries in them.
    """

    name: str
    tokens: int
    n: int
    owners: tuple[int, ...]
    alignment: int = 1
    gpu_only: bool = False


CASES = (
    Case("empty", tokens=0, n=8, owners=(0,)),
    Case("one row", tokens=1, n=64, owners=(0,), alignment=8),
    Case("nobody uses an adapter", tokens=5, n=64, owners=(-1,)),
    Case("each its own", tokens=6, n=160, owners=(0, 1, 2, 3, 4, 5), alignment=8),
    Case("mixed", tokens=13, n=1040, owners=(0, -1, 2, 2, -1, 1), alignment=8),
    Case("divides nothing", tokens=7, n=1123, owners=(1, 0, -1)),
    Case("largest", tokens=8192, n=28672, owners=tuple(range(-1, 63)), gpu_only=True),
)


class Inputs(NamedTuple):
    """Arguments of ``scale_outputs``."""

    y: Tensor
    arena: Tensor
    addresses: Tensor
    offset: int
    alignment: int


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Random outputs of magnitude one, factors from about 0.7 to 1.3; NaN around the entries."""
    generator = torch.Generator().manual_seed(seed)
    offset = 3 * case.alignment
    blocks = []
    for _ in range(max(case.owners) + 1):
        block = torch.full((offset + case.n,), float("nan"), dtype=dtype)
        block[offset:] = random((case.n,), generator, dtype, 0.1)
        blocks.append(block)
    arena, starts = poisoned_arena(blocks)
    owners = [case.owners[t % len(case.owners)] for t in range(case.tokens)]
    addresses = [-1 if owner < 0 else starts[owner] for owner in owners]
    y = random((case.tokens, case.n), generator, dtype).to(device)
    return Inputs(
        poisoned_rows(y),
        arena.to(device),
        torch.tensor(addresses, dtype=torch.int64, device=device),
        offset,
        case.alignment,
    )
