"""Benchmark of ``grouped_matmul``: ``python -m shoal.kernels.grouped_matmul.bench [--check]``.

Matrices are spread over the whole arena, as those of one layer are when every adapter is one
contiguous record.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from shoal.kernels.benching import Bench, OpBench, Record, run
from shoal.kernels.grouped_matmul.cases import CASES, make_inputs
from shoal.kernels.grouped_matmul.kernel import (
    MatmulConfig,
    grouped_matmul,
    launch_grouped_matmul,
    upload_tiles,
)
from shoal.kernels.grouped_matmul.reference import grouped_matmul_reference
from shoal.kernels.grouped_matmul.tiles import make_tiles
from shoal.kernels.launching import kernel_runs_on
from shoal.kernels.shapes import DECODE_TOKENS, LLAMA_3_1_8B, PROMPT_TOKENS, SMOLLM2_135M
from shoal.kernels.testing import TOLERANCE, max_error

EXPAND_SWEEP = (
    *(
        MatmulConfig(n, 16, single, w, 1)
        for n in (128, 256, 512)
        for w in (2, 4, 8)
        for single in (16, None)
    ),
    MatmulConfig(1024, 16, 16, 8, 1),
    MatmulConfig(128, 64, 64, 4, 1),
    MatmulConfig(128, 64, 16, 4, 1),
    MatmulConfig(256, 64, 16, 8, 1),
    MatmulConfig(128, 32, 16, 4, 3),
)
SHRINK_SWEEP = (
    *(MatmulConfig(n, 128, 512, 4, s) for n in (4, 8, 16) for s in (1, 3)),
    *(MatmulConfig(n, 128, 1024, 8, 1) for n in (4, 8, 16)),
    *(MatmulConfig(1, 256, k, 4, s) for k, s in ((2048, 1), (4096, 1), (1024, 4))),
    *(MatmulConfig(2, 256, k, 4, s) for k, s in ((1024, 1), (2048, 1), (1024, 3))),
    MatmulConfig(16, 256, None, 4, 3),
    MatmulConfig(16, 128, None, 4, 4),
    MatmulConfig(16, 64, 512, 4, 4),
    MatmulConfig(32, 128, 256, 4, 3),
    MatmulConfig(64, 128, 128, 4, 3),
)


def check(device: torch.device) -> dict[torch.dtype, float]:
    """Largest error over all cases in units of a case's slack, by dtype."""
    op = launch_grouped_matmul if kernel_runs_on(device) else grouped_matmul
    errors = dict.fromkeys(TOLERANCE, 0.0)
    for case in CASES:
        if case.gpu_only and device.type == "cpu":
            continue
        for dtype in TOLERANCE:
            inputs = make_inputs(case, dtype, device, seed=7)
            x, arena, addresses, out, row_stride, transposed, ranks, tiles, alignment = inputs
            expected = out.clone()
            grouped_matmul_reference(
                x,
                arena,
                addresses,
                expected,
                row_stride=row_stride,
                transposed=transposed,
                ranks=ranks,
                tiles=tiles,
            )
            op(
                x,
                arena,
                addresses,
                out,
                row_stride=row_stride,
                transposed=transposed,
                ranks=ranks,
                tiles=tiles,
                alignment=alignment,
            )
            errors[dtype] = max(errors[dtype], max_error(out, expected) / case.slack)
    return errors


def _baseline(
    x: Tensor, arena: Tensor, addresses: Tensor, out: Tensor, transposed: bool, shared: bool
) -> tuple[str, Callable[[], object]]:
    """Plain torch: gather and bmm; or one dense product when all tokens share one adapter."""
    k, n = x.shape[1], out.shape[1]
    rows, width = (n, k) if transposed else (k, n)
    x = x.to(arena.dtype)
    if shared:
        first = int(addresses[0])
        stored = arena[first : first + rows * width].view(rows, width)
        only = stored.t() if transposed else stored
        return "dense", lambda: out.add_(x @ only)
    size = rows * width
    bank = arena.as_strided(((arena.numel() - size) // 16 + 1, size), (16, 1))
    places = addresses // 16

    def gather() -> None:
        stored = bank.index_select(0, places).view(-1, rows, width)
        matrices = stored.transpose(1, 2) if transposed else stored
        out.add_(torch.bmm(x[:, None], matrices).squeeze(1))

    return "gather+bmm", gather


def _record(
    bench: Bench,
    case: str,
    tokens: int,
    k: int,
    n: int,
    distinct: int,
    config: MatmulConfig | None = None,
) -> Record:
    """``k > n`` is a shrink (transposed, float32 out), else an expand (float32 x)."""
    transposed = k > n
    arena = bench.arena()
    record = arena.numel() // max(distinct, 64)
    addresses = bench.addresses(distinct, tokens, record, k * n)
    x = torch.randn((tokens, k), device=bench.device)
    out = torch.zeros((tokens, n), device=bench.device)
    x, out = (x.to(bench.dtype), out) if transposed else (x, out.to(bench.dtype))
    runs = [(address, 1) for address in addresses.tolist()]
    tiles = upload_tiles(make_tiles(runs), bench.device)
    moved = distinct * k * n * arena.element_size()
    moved += x.numel() * x.element_size() + 2 * out.numel() * out.element_size()
    # A gathered copy of a prompt's matrices would not fit: there the baseline is dense or none.
    feasible = distinct == 1 or tokens * k * n <= 1 << 29
    return bench.record(
        "grouped_matmul",
        case,
        {"tokens": tokens, "k": k, "n": n, "adapters": distinct},
        lambda: grouped_matmul(
            x,
            arena,
            addresses,
            out,
            row_stride=k if transposed else n,
            transposed=transposed,
            tiles=tiles,
            alignment=16,
            config=config,
        ),
        bytes_moved=moved,
        baseline=_baseline(x, arena, addresses, out, transposed, distinct == 1 < tokens)
        if config is None and feasible
        else None,
        config=config or "default",
    )


def measure(bench: Bench) -> list[Record]:
    """Decode batches with all-different and with shared adapters, and prompts."""
    shape = LLAMA_3_1_8B if bench.on_gpu else SMOLLM2_135M
    token_counts = DECODE_TOKENS if bench.on_gpu else (1, 16)
    last = token_counts[-1]
    rows = []
    for tokens in token_counts:
        rows.append(_record(bench, "expand q", tokens, 16, shape.q, tokens))
        rows.append(_record(bench, "expand gate_up", tokens, 16, 2 * shape.ffn, tokens))
        rows.append(_record(bench, "shrink hidden", tokens, shape.hidden, 16, tokens))
        rows.append(_record(bench, "shrink ffn", tokens, shape.ffn, 16, tokens))
    for distinct in (1, max(1, last // 16)):
        rows.append(_record(bench, "expand q, shared", last, 16, shape.q, distinct))
        rows.append(_record(bench, "shrink hidden, shared", last, shape.hidden, 16, distinct))
    for rank in (8, 32, 64):
        rows.append(_record(bench, "expand q", last, rank, shape.q, last))
        rows.append(_record(bench, "shrink hidden", last, shape.hidden, rank, last))
    if bench.on_gpu:
        for rank in (16, 64):
            rows.append(_record(bench, "prompts expand", PROMPT_TOKENS, rank, shape.q, 1))
            rows.append(_record(bench, "prompts shrink", PROMPT_TOKENS, shape.hidden, rank, 1))
    return rows


def sweep(bench: Bench) -> list[Record]:
    """Every launch variant at a few points that bracket the use."""
    shape = LLAMA_3_1_8B
    expands = (
        ("decode", 1, 16, 2 * shape.ffn, 1),
        ("decode", 16, 16, shape.q, 16),
        ("decode", 256, 16, shape.q, 256),
        ("decode", 256, 64, shape.q, 256),
        ("shared", 256, 16, 2 * shape.ffn, 16),
        ("prompts", PROMPT_TOKENS, 64, shape.q, 4),
    )
    shrinks = (
        ("decode", 1, shape.hidden, 16, 1),
        ("decode", 16, shape.ffn, 16, 16),
        ("decode", 256, shape.hidden, 16, 256),
        ("shared", 256, shape.hidden, 64, 16),
        ("prompts", PROMPT_TOKENS, shape.ffn, 64, 4),
    )
    rows = [_record(bench, *point, config) for point in expands for config in EXPAND_SWEEP]
    return rows + [_record(bench, *point, config) for point in shrinks for config in SHRINK_SWEEP]


BENCH = OpBench("grouped_matmul", check, measure, sweep)

if __name__ == "__main__":
    sys.exit(run([BENCH]))
