"""Adapters for the benchmarks of kernels with an ``Epilogue``. Owns no clock."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.kernels.benching import Bench
from shoal.kernels.core_apply.epilogue import (
    CoreEpilogue,
    CoreRows,
    Epilogue,
    MixedEpilogue,
    RowScale,
)
from shoal.kernels.core_apply.kernel import core_apply
from shoal.kernels.launching import TileConfig
from shoal.kernels.shapes import DECODE_TOKENS, PROMPT_TOKENS, ModelShape

WIDENED = 192  # columns a GEMM is widened by: three modules of 64
SPLITS = 8  # of core_project

# The launch parameters a sweep tries: with adapters, with those of a prompt, and without.
TILES = (
    TileConfig(16, 64, 4),
    *(TileConfig(16, n, w) for n in (128, 256) for w in (4, 8)),
    TileConfig(16, 512, 8),
)
PROMPT_TILES = (
    TileConfig(16, 256, 4),
    *(TileConfig(t, 128, w) for t in (32, 64) for w in (4, 8)),
    TileConfig(64, 256, 8),
)


class Point(NamedTuple):
    """What a row of a benchmark is measured at: ``columns`` 0 is without adapters."""

    tokens: int
    columns: int = 0
    distinct: int = 0
    splits: int = 0  # 0: h from the widened GEMM; else u, made in so many splits

    @property
    def case(self) -> str:
        if not self.columns:
            return "no adapters"
        kind = "mixed" if self.splits else "inline"
        return f"{kind}, {'all differ' if self.distinct == self.tokens else 'shared'}"


SWEPT = (Point(32, 16, 32), Point(128, 16, 128), Point(256, 16, 256), Point(256, 32, 256))
SWEPT_PROMPTS = (Point(PROMPT_TOKENS, 16, 8, 1), Point(PROMPT_TOKENS, 64, 8, 1))
SWEPT_WITHOUT = tuple(Point(tokens) for tokens in (32, 128, 256, PROMPT_TOKENS))


def points(on_gpu: bool) -> list[Point]:
    """Decode batches and prompts: without adapters, inline and mixed."""
    tokens = DECODE_TOKENS if on_gpu else (1, 64)
    last = tokens[-1]
    found = [Point(count) for count in tokens]
    found += [Point(count, 16, count) for count in tokens]
    found += [Point(last, 32, last), Point(last, 16, 1)]
    found += [Point(last, columns, last, SPLITS) for columns in (16, 64)]
    if on_gpu:
        found += [Point(PROMPT_TOKENS), Point(PROMPT_TOKENS, 16, 8), *SWEPT_PROMPTS]
    return found


def widened(bench: Bench, tokens: int, n: int) -> Tensor:
    """A GEMM's output of ``n`` columns and those it was widened by."""
    size = (tokens, n + WIDENED)
    return torch.randn(size, dtype=bench.dtype, device=bench.device) * 0.02


def bench_rows(
    bench: Bench, shape: ModelShape, tokens: int, distinct: int, columns: int, modules: int
) -> CoreRows:
    """Adapters of rank ``columns`` in the bench's arena; the tokens share ``distinct`` of them."""
    size = columns * columns
    ranks = torch.full((tokens,), columns, dtype=torch.int32, device=bench.device)
    return CoreRows(
        bench.arena(),
        bench.addresses(distinct, tokens, shape.layers * 7 * size, modules * size),
        ranks,
        torch.zeros_like(ranks),
        columns,
        alignment=8,
    )


class BenchCore(NamedTuple):
    """Adapters at a point: the epilogue, its rows, and what it adds to a call's traffic."""

    epilogue: Epilogue
    rows: CoreRows
    bytes: int


def bench_core(
    bench: Bench, shape: ModelShape, point: Point, widths: Sequence[int]
) -> BenchCore | None:
    """The adapters of a point behind a ``widened`` GEMM's output; None without."""
    tokens, columns, distinct, splits = point
    if not columns:
        return None
    modules, n = len(widths), sum(widths)
    rows = bench_rows(bench, shape, tokens, distinct, columns, modules)
    basis = torch.randn((columns, n), dtype=bench.dtype, device=bench.device) * 0.02
    item = basis.element_size()
    if splits:
        mixed = torch.randn((splits, tokens, modules, columns), device=bench.device) * 0.02
        return BenchCore(MixedEpilogue(mixed, basis), rows, mixed.numel() * 4 + columns * n * item)
    read = modules * columns * (tokens + distinct * columns) + columns * n
    return BenchCore(CoreEpilogue(rows, basis, n, 0), rows, read * item)


def bench_scale(bench: Bench, tokens: int, width: int) -> RowScale:
    """The deferred norm of a residual of ``width`` columns."""
    return RowScale(torch.rand((16, tokens), device=bench.device) * width / 16, width, 1e-5)


def applied_apart(source: Tensor, core: BenchCore, widths: Sequence[int]) -> Callable[[], None]:
    """A call that adds such deltas to the GEMM's output by a ``core_apply`` for each module."""
    rows = core.rows
    ends = list(itertools.accumulate(widths))
    parts = []
    for end, width in zip(ends, widths, strict=True):
        outputs = slice(end - width, end)
        h = source[:, sum(widths) :][:, : rows.columns]
        parts.append((source[:, outputs], h, core.epilogue.basis[:, outputs].t().contiguous()))

    def apply() -> None:
        for y, h, basis in parts:
            core_apply(
                y, h, rows.arena, rows.addresses, rows.ranks, basis, alignment=rows.alignment
            )

    return apply
