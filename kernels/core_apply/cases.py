"""Inputs of ``core_apply`` for its tests and its benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.kernels.testing import poisoned_arena, poisoned_rows, random


@dataclass(frozen=True, slots=True)
class Case:
    """One shape of input.

    Attributes:
        ranks: the adapters' ranks; adapter ``a`` has ``ranks[a % len(ranks)]``.
        adapters: how many distinct adapters; token ``t`` uses ``t % adapters``.
        bare_every: every so many tokens one has no adapter (0: all have one).
        alignment: what to promise about addresses and ranks.
        strided: y, h and basis are views with NaN around them.
    """

    name: str
    tokens: int
    n: int
    columns: int
    ranks: tuple[int, ...]
    adapters: int
    bare_every: int = 0
    alignment: int = 1
    strided: bool = False
    gpu_only: bool = False

    @property
    def slack(self) -> float:
        """Multiplies the tolerance: 10⁸ outputs, or sums of 10⁴ terms, have rarer extremes."""
        return 3.0 if self.gpu_only else 1.0


CASES = (
    Case("empty", tokens=0, n=32, columns=8, ranks=(8,), adapters=1),
    Case("one row", tokens=1, n=48, columns=4, ranks=(4,), adapters=1),
    Case("one row of rank one", tokens=1, n=7, columns=1, ranks=(1,), adapters=1),
    Case("all bare", tokens=5, n=32, columns=8, ranks=(8,), adapters=1, bare_every=1),
    Case("with bare rows", tokens=19, n=64, columns=16, ranks=(16,), adapters=4, bare_every=3),
    Case("divides nothing", tokens=37, n=123, columns=13, ranks=(5, 13), adapters=7, bare_every=4),
    Case(
        "strided views", tokens=17, n=75, columns=9, ranks=(9, 3), adapters=5, bare_every=5,
        strided=True,
    ),
    Case(
        "mixed ranks", tokens=40, n=130, columns=64, ranks=(1, 16, 64, 5, 33, 8), adapters=12,
        bare_every=7, strided=True,
    ),
    Case("aligned", tokens=33, n=96, columns=64, ranks=(8, 16, 64, 32), adapters=9, alignment=8),
    Case("large ranks", tokens=5, n=40, columns=130, ranks=(130, 65, 8), adapters=3, bare_every=4),
    Case("shared adapter", tokens=70, n=64, columns=16, ranks=(16,), adapters=1, alignment=16),
    Case(
        "largest", tokens=4096, n=28672, columns=64, ranks=(16, 64, 7), adapters=300, bare_every=9,
        gpu_only=True,
    ),
)  # fmt: skip


class Inputs(NamedTuple):
    """Arguments of ``core_apply``, in its order."""

    y: Tensor
    h: Tensor
    arena: Tensor
    addresses: Tensor
    ranks: Tensor
    basis: Tensor


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Random inputs whose deltas have magnitude about one.

    NaN fills the arena around the adapters, the columns of h that a token's rank leaves out, and
    all of h for a token without adapter.
    """
    generator = torch.Generator().manual_seed(seed)
    ranks = [case.ranks[a % len(case.ranks)] for a in range(case.adapters)]
    blocks = [random((r, r), generator, dtype, r**-0.5) for r in ranks]
    arena, addresses = poisoned_arena(blocks)
    owners = [t % case.adapters for t in range(case.tokens)]
    bare = [case.bare_every > 0 and t % case.bare_every == 0 for t in range(case.tokens)]
    address = [-1 if bare[t] else addresses[owner] for t, owner in enumerate(owners)]
    rank = [ranks[owner] for owner in owners]
    h = random((case.tokens, case.columns), generator, dtype)
    used = torch.tensor([0 if bare[t] else rank[t] for t in range(case.tokens)])
    beyond = torch.arange(case.columns)[None, :] >= used.view(-1, 1)
    h = h.masked_fill(beyond, float("nan"))
    y = random((case.tokens, case.n), generator, dtype)
    basis = random((case.n, case.columns), generator, dtype, case.columns**-0.5)
    y, h, arena, basis = (tensor.to(device) for tensor in (y, h, arena, basis))
    if case.strided:
        y, h, basis = (poisoned_rows(tensor) for tensor in (y, h, basis))
    return Inputs(
        y,
        h,
        arena,
        torch.tensor(address, dtype=torch.int64, device=device),
        torch.tensor(rank, dtype=torch.int32, device=device),
        basis,
    )
