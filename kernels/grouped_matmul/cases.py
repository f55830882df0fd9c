"""Inputs of ``grouped_matmul`` for its tests and its benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.kernels.grouped_matmul.kernel import Tiles, upload_tiles
from shoal.kernels.grouped_matmul.tiles import make_tiles
from shoal.kernels.testing import poisoned_arena, poisoned_rows, random


@dataclass(frozen=True, slots=True)
class Case:
    """One shape of input.

    Attributes:
        runs: ``(adapter, tokens)`` in token order; -1 is a run without adapter.
        margin: columns that a stored row has on each side of the window that is used.
        ranks: the adapters' numbers of stored rows, by turns; empty: all have all rows.
        tile_tokens: None leaves every token on its own.
        padding: empty tiles at the end of the plan.
        strided: x and out are views with NaN around their rows.
    """

    name: str
    k: int
    n: int
    runs: tuple[tuple[int, int], ...]
    transposed: bool = False
    margin: int = 0
    ranks: tuple[int, ...] = ()
    tile_tokens: int | None = 16
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

CASES = (
    Case("empty", k=8, n=32, runs=()),
    Case("one row expands", k=8, n=32, runs=((0, 1),), tile_tokens=None),
    Case("one row shrinks", k=32, n=8, runs=((0, 1),), transposed=True),
    Case("nobody uses an adapter", k=8, n=32, runs=((-1, 5),), tile_tokens=None),
    Case("nobody uses an adapter, no tiles", k=8, n=32, runs=((-1, 5),)),
    Case("expand, each on its own", k=16, n=160, runs=SINGLES, tile_tokens=None, alignment=8),
    Case("expand, mixed runs", k=16, n=160, runs=MIXED, alignment=8),
    Case("expand divides nothing", k=5, n=123, runs=MIXED, padding=3, strided=True),
    Case("expand a window", k=5, n=123, runs=MIXED, margin=7, strided=True),
    Case("expand several steps", k=150, n=40, runs=MIXED, margin=3, strided=True),
    Case("expand mixed ranks", k=33, n=70, runs=MIXED, ranks=(33, 1, 16, 5), strided=True),
    Case("shrink, each on its own", k=600, n=16, runs=SINGLES, transposed=True, tile_tokens=None),
    Case("shrink, mixed runs", k=512, n=16, runs=MIXED, transposed=True, alignment=8),
    Case(
        "shrink divides nothing", k=523, n=5, runs=MIXED, transposed=True, padding=1, strided=True
    ),
    Case(
        "shrink a window, mixed ranks", k=123, n=40, runs=MIXED, transposed=True, margin=5,
        ranks=(3, 40, 17, 8), tile_tokens=32, strided=True,
    ),
    Case(
        "largest expand", k=64, n=28672, runs=tuple((a % 64 - 1, 1 + 3 * a) for a in range(64)),
        margin=16, strided=True, gpu_only=True,
    ),
    Case(
        "largest shrink", k=14336, n=64, runs=tuple((a % 64 - 1, 1 + 3 * a) for a in range(64)),
        transposed=True, strided=True, gpu_only=True,
    ),
)  # fmt: skip


class Inputs(NamedTuple):
    """Arguments of ``grouped_matmul``."""

    x: Tensor
    arena: Tensor
    addresses: Tensor
    out: Tensor
    row_stride: int
    transposed: bool
    ranks: Tensor | None
    tiles: Tiles | None
    alignment: int


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Random inputs whose products have magnitude about one.

    NaN fills the arena around the adapters, the columns beside the windows, and the columns of x
    that a token's rank leaves out.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, width = (case.n, case.k) if case.transposed else (case.k, case.n)
    adapters = 1 + max((adapter for adapter, _ in case.runs), default=0)
    rank_of = [case.ranks[a % len(case.ranks)] if case.ranks else rows for a in range(adapters)]
    row_stride = width + 2 * case.margin
    blocks = []
    for rank in rank_of:
        block = torch.full((rank, row_stride), float("nan"), dtype=dtype)
        block[:, case.margin : case.margin + width] = random(
            (rank, width), generator, dtype, case.k**-0.5
        )
        blocks.append(block)
    arena, starts = poisoned_arena(blocks)
    runs = [(-1 if a < 0 else starts[a] + case.margin, tokens) for a, tokens in case.runs]
    owners = [a for a, tokens in case.runs for _ in range(tokens)]
    ranks = [1 if a < 0 else rank_of[a] for a in owners]
    x = random((len(owners), case.k), generator, dtype)
    if case.ranks and not case.transposed:
        beyond = torch.arange(case.k)[None, :] >= torch.tensor(ranks)[:, None]
        x = x.masked_fill(beyond, float("nan"))
    out = random((len(owners), case.n), generator, dtype).to(device)
    x = x.to(device)
    if case.strided:
        x, out = poisoned_rows(x), poisoned_rows(out)
    tiles = None
    if case.tile_tokens is not None:
        plan = make_tiles(runs, case.tile_tokens)
        plan = make_tiles(runs, case.tile_tokens, pad_to=len(plan.starts) + case.padding)
        tiles = upload_tiles(plan, device)
    addresses = [address for address, tokens in runs for _ in range(tokens)]
    return Inputs(
        x,
        arena.to(device),
        torch.tensor(addresses, dtype=torch.int64, device=device),
        out,
        row_stride,
        case.transposed,
        torch.tensor(ranks, dtype=torch.int32, device=device) if case.ranks else None,
        tiles,
        case.alignment,
    )
