"""Adapters for the benchmarks of kernels with a ``CoreEpilogue``. Owns no clock."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shoal.kernels.benching import Bench
from shoal.kernels.core_apply.epilogue import CoreEpilogue
from shoal.kernels.core_apply.kernel import core_apply
from shoal.kernels.shapes import ModelShape

WIDENED = 128  # columns a GEMM is widened by


def widened(bench: Bench, tokens: int, n: int) -> Tensor:
    """A GEMM's output of ``n`` columns and those it was widened by."""
    size = (tokens, n + WIDENED)
    return torch.randn(size, dtype=bench.dtype, device=bench.device) * 0.02


def bench_core(
    bench: Bench, shape: ModelShape, tokens: int, distinct: int, rank: int, widths: Sequence[int]
) -> CoreEpilogue:
    """Adapters of ``rank`` in the bench's arena; ``tokens`` tokens share ``distinct`` of them."""
    size = rank * rank
    basis = torch.randn((rank, sum(widths)), dtype=bench.dtype, device=bench.device) * 0.02
    return CoreEpilogue(
        arena=bench.arena(),
        addresses=bench.addresses(distinct, tokens, shape.layers * 7 * size, len(widths) * size),
        ranks=torch.full((tokens,), rank, dtype=torch.int32, device=bench.device),
        basis=basis.t(),
        h_column=sum(widths),
        alignment=8,
    )


def core_bytes(core: CoreEpilogue, distinct: int, modules: int) -> int:
    """What the adapters add to a call's traffic."""
    columns = core.basis.shape[1]
    elements = core.ranks.shape[0] * modules * columns + distinct * modules * columns**2
    return (elements + core.basis.numel()) * core.arena.element_size()


def applied_apart(source: Tensor, core: CoreEpilogue, widths: Sequence[int]) -> Callable[[], None]:
    """A call that adds the same deltas to the GEMM's output, by a launch for each module."""
    columns = core.basis.shape[1]
    ends = list(itertools.accumulate(widths))
    parts = []
    for module, (end, width) in enumerate(zip(ends, widths, strict=True)):
        rows = slice(end - width, end)
        h = source[:, core.h_column + module * columns :][:, :columns]
        parts.append((source[:, rows], h, core.basis[rows].contiguous()))

    def apply() -> None:
        for y, h, basis in parts:
            core_apply(
                y, h, core.arena, core.addresses, core.ranks, basis, alignment=core.alignment
            )

    return apply
