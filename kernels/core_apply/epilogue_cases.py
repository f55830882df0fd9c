"""Adapters for the cases of kernels with a ``CoreEpilogue``. Owns no outputs: those are theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.core_apply.epilogue import CoreEpilogue
from shoal.kernels.testing import poisoned_arena, poisoned_rows, random


@dataclass(frozen=True, slots=True)
class CoreCase:
    """The adapters of a case.

    Attributes:
        columns: of h and of the basis, for each module.
        ranks: adapter ``a`` has ``ranks[a % len(ranks)]``.
        firsts: where adapter ``a``'s basis starts, ``firsts[a % len(firsts)]``; empty: not passed.
        adapters: how many distinct adapters; token ``t`` uses ``t % adapters``.
        bare_every: every so many tokens one has no adapter (0: all have one).
        gap: columns between the outputs and h.
        rank_major: the basis is contiguous along the outputs.
    """

    columns: int
    ranks: tuple[int, ...]
    adapters: int
    firsts: tuple[int, ...] = ()
    bare_every: int = 0
    gap: int = 0
    matrix: int = 0
    alignment: int = 1
    rank_major: bool = True


def widen(
    y0: Tensor, case: CoreCase | None, widths: Sequence[int], generator: torch.Generator
) -> tuple[Tensor, CoreEpilogue | None]:
    """A strided row ``[y0, gap, h…, margin]`` as the widened GEMM leaves it, and its adapters.

    NaN fills the arena around the used matrices, the gap, the margins, and the columns of h that
    a token does not use. Deltas have magnitude about one. Everything is on y0's device.
    """
    if case is None:
        return poisoned_rows(y0), None
    tokens, dtype, device = y0.shape[0], y0.dtype, y0.device
    ranks = [case.ranks[a % len(case.ranks)] for a in range(case.adapters)]
    firsts = case.firsts or (0,)
    records = []
    for rank in ranks:
        before = torch.full((case.matrix, rank, rank), float("nan"), dtype=dtype)
        used = random((len(widths), rank, rank), generator, dtype, rank**-0.5)
        records.append(torch.cat((before, used)))
    arena, starts = poisoned_arena(records)
    owner = torch.arange(tokens) % case.adapters
    bare = torch.arange(tokens) % max(1, case.bare_every) == 0
    bare = bare if case.bare_every else torch.zeros_like(bare)
    address = torch.tensor(starts)[owner].masked_fill(bare, -1)
    rank_of = torch.tensor(ranks, dtype=torch.int32)[owner]
    first_of = torch.tensor([firsts[a % len(firsts)] for a in range(case.adapters)])[owner]
    column = torch.arange(case.columns)
    used = (column >= first_of[:, None]) & (column < (first_of + rank_of)[:, None])
    used = used & ~bare[:, None]
    h = random((tokens, len(widths), case.columns), generator, dtype)
    h = h.masked_fill(~used[:, None], float("nan")).flatten(1)
    gap = torch.full((tokens, case.gap), float("nan"), dtype=dtype)
    row = torch.cat((y0.cpu(), gap, h), dim=1).to(device)
    basis = random((sum(widths), case.columns), generator, dtype, case.columns**-0.5)
    basis = poisoned_rows((basis.t() if case.rank_major else basis).to(device))
    return poisoned_rows(row), CoreEpilogue(
        arena=arena.to(device),
        addresses=address.to(device),
        ranks=rank_of.to(device),
        basis=basis.t() if case.rank_major else basis,
        h_column=y0.shape[1] + case.gap,
        matrix=case.matrix,
        firsts=first_of.to(torch.int32).to(device) if case.firsts else None,
        alignment=case.alignment,
    )
