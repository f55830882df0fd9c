"""Inputs of ``shrink`` and ``expand`` for their tests and their benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.kernels.grouped_matmul.kernel import TileTable, upload_tiles
from shoal.kernels.grouped_matmul.tiles import make_tiles
from shoal.kernels.testing import poisoned_arena, poisoned_rows, random


@dataclass(frozen=True, slots=True)
class Case:
    """One shape of input.

    Attributes:
        k: inputs of a shrink; unused by an expand.
        widths: outputs of an expand's modules; of a shrink only their number counts.
        runs: ``(adapter, tokens)`` in token order; -1 is a run without adapter.
        ranks: the adapters' ranks, by turns.
        padding: unused tiles at the end of the table.
        strided: x and out are views with NaN around their rows.
    """

    name: str
    runs: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...]
    k: int = 0
    widths: tuple[int, ...] = (32,)
    padding: int = 0
    alignment: int = 1
    strided: bool = False
    gpu_only: bool = False

    @property
    def slack(self) -> float:
        """Multiplies the tolerance: 10⁸ outputs, or sums of 10⁴ terms, have rarer extremes."""
        return 3.0 if self.gpu_only else 1.0


MIXED = ((0, 1), (1, 1), (-1, 3), (2, 20), (0, 2), (3, 37), (-1, 1))
SINGLES = tuple((a % 5 - 1, 1) for a in range(13))
LARGEST = tuple((a % 64 - 1, 1 + 3 * a) for a in range(64))
RANKS = (33, 1, 16, 5)

EXPANDS = (
    Case("empty", runs=(), ranks=(8,)),
    Case("one row", runs=((0, 1),), ranks=(8,)),
    Case("nobody uses an adapter", runs=((-1, 5),), ranks=(8,), padding=2),
    Case("each on its own", SINGLES, (16,), widths=(160,), alignment=8),
    Case("mixed runs", MIXED, (16,), widths=(160,), padding=9, alignment=8),
    Case("divides nothing, mixed ranks", MIXED, RANKS, widths=(123,), padding=3, strided=True),
    Case("three modules", MIXED, RANKS, widths=(160, 32, 48), alignment=8, padding=1),
    Case("two modules, each on its own", SINGLES, (3, 70), widths=(131, 131), strided=True),
    Case("largest", LARGEST, (64, 16), widths=(14336, 14336), strided=True, gpu_only=True),
)
SHRINKS = (
    Case("empty", runs=(), ranks=(8,), k=32),
    Case("one row", runs=((0, 1),), ranks=(8,), k=32),
    Case("nobody uses an adapter", runs=((-1, 5),), ranks=(8,), k=32, padding=2),
    Case("each on its own", SINGLES, (16,), k=600),
    Case("mixed runs", MIXED, (16,), k=512, padding=9, alignment=8),
    Case("divides nothing, mixed ranks", MIXED, RANKS, k=523, padding=1, strided=True),
    Case("three modules", MIXED, RANKS, k=96, widths=(1,) * 3, padding=4, alignment=8),
    Case("two modules, each on its own", SINGLES, (3, 70), k=77, widths=(1, 1), strided=True),
    Case("largest", LARGEST, (64, 16), k=14336, widths=(1, 1), strided=True, gpu_only=True),
)


class Inputs(NamedTuple):
    """Arguments of ``shrink`` or ``expand``; ``ranks``: by token, 0 without adapter."""

    x: Tensor
    arena: Tensor
    tiles: TileTable
    out: Tensor
    modules: int
    widths: tuple[int, ...]
    scale: int
    alignment: int
    ranks: tuple[int, ...]


# What lies before a matrix in its record, for each rank; a multiple of 16.
SCALE = 48


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device, seed: int, *, expands: bool
) -> Inputs:
    """Random inputs whose products have magnitude about one.

    NaN fills the arena around the matrices, and the columns of x beyond a token's ranks.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = len(case.widths)
    adapters = 1 + max((adapter for adapter, _ in case.runs), default=0)
    rank_of = [case.ranks[a % len(case.ranks)] for a in range(adapters)]
    blocks = []
    for rank in rank_of:
        rows, width = (rank, sum(case.widths)) if expands else (modules * rank, case.k)
        terms = rank if expands else case.k
        block = torch.full((rank * SCALE + rows * width,), float("nan"), dtype=dtype)
        block[rank * SCALE :] = random((rows * width,), generator, dtype, terms**-0.5)
        blocks.append(block)
    arena, records = poisoned_arena(blocks)
    owners = [a for a, tokens in case.runs for _ in range(tokens)]
    ranks = [0 if a < 0 else rank_of[a] for a in owners]
    columns = modules * max(case.ranks)
    x = random((len(owners), columns if expands else case.k), generator, dtype)
    out = random((len(owners), sum(case.widths) if expands else columns), generator, dtype)
    if expands:
        beyond = torch.arange(columns) >= modules * torch.tensor(ranks, dtype=torch.int64)[:, None]
        x = x.masked_fill(beyond, float("nan"))
    x, out = x.to(device), out.to(device)
    if case.strided:
        x, out = poisoned_rows(x), poisoned_rows(out)
    runs, start = [], 0
    for adapter, tokens in case.runs:
        if adapter >= 0:
            runs.append((start, tokens, records[adapter], rank_of[adapter]))
        start += tokens
    plan = make_tiles(runs)
    tiles = upload_tiles(plan, device, len(plan.starts) + case.padding)
    return Inputs(
        x,
        arena.to(device),
        tiles,
        out,
        modules,
        case.widths,
        SCALE,
        case.alignment,
        tuple(ranks),
    )
