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
from shoal.kernels.grouped_matmul.cases import EXPANDS, SHRINKS, make_inputs
from shoal.kernels.grouped_matmul.kernel import (
    ExpandConfig,
    ShrinkConfig,
    expand,
    launch_expand,
    launch_shrink,
    shrink,
    upload_tiles,
)
from shoal.kernels.grouped_matmul.reference import expand_reference, shrink_reference
from shoal.kernels.grouped_matmul.tiles import make_tiles
from shoal.kernels.launching import kernel_runs_on
from shoal.kernels.shapes import DECODE_TOKENS, LLAMA_3_1_8B, PROMPT_TOKENS, SMOLLM2_135M
from shoal.kernels.testing import TOLERANCE, max_error

EXPAND_SWEEP = (
    *(
        ExpandConfig(n, 16, single, w)
        for n in (128, 256, 512)
        for w in (2, 4, 8)
        for single in (True, False)
    ),
    ExpandConfig(1024, 16, True, 8),
    ExpandConfig(128, 64, True, 4),
    ExpandConfig(256, 64, True, 8),
    ExpandConfig(128, 32, True, 4),
)
SHRINK_SWEEP = (
    *(ShrinkConfig(16, 256, n, 512, 4, s) for n in (4, 8, 16) for s in (1, 3)),
    *(ShrinkConfig(16, 256, n, 1024, 8, 1) for n in (4, 8, 16)),
    *(ShrinkConfig(16, 256, 1, k, 4, s) for k, s in ((2048, 1), (4096, 1), (1024, 4))),
    *(ShrinkConfig(16, 256, 2, k, 4, s) for k, s in ((1024, 1), (2048, 1), (1024, 3))),
    ShrinkConfig(16, 256, None, None, 4, 3),
    ShrinkConfig(16, 128, None, None, 4, 4),
    ShrinkConfig(16, 64, 16, 512, 4, 4),
    ShrinkConfig(32, 128, 4, 512, 4, 3),
    ShrinkConfig(32, 128, None, None, 4, 3),
    ShrinkConfig(64, 128, None, None, 4, 3),
)


def check(device: torch.device) -> dict[torch.dtype, float]:
    """Largest error over all cases in units of a case's slack, by dtype."""
    runs = kernel_runs_on(device)
    errors = dict.fromkeys(TOLERANCE, 0.0)
    for case, expands in [(c, False) for c in SHRINKS] + [(c, True) for c in EXPANDS]:
        if case.gpu_only and device.type == "cpu":
            continue
        for dtype in TOLERANCE:
            inputs = make_inputs(case, dtype, device, seed=7, expands=expands)
            x, arena, tiles, out, modules, widths, scale, alignment, _ = inputs
            expected = out.clone()
            if expands:
                expand_reference(x, arena, tiles, expected, widths=widths, scale=scale)
                wide = launch_expand if runs else expand
                wide(x, arena, tiles, out, widths=widths, scale=scale, alignment=alignment)
            else:
                shrink_reference(x, arena, tiles, expected, modules=modules, scale=scale)
                narrow = launch_shrink if runs else shrink
                narrow(x, arena, tiles, out, modules=modules, scale=scale, alignment=alignment)
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
    config: ShrinkConfig | ExpandConfig | None = None,
) -> Record:
    """``k > n`` is a shrink (float32 out), else an expand (float32 x); one module.

    A decode batch's table has room for every token on its own, as a captured step's has.
    """
    shrinks = k > n
    arena = bench.arena()
    record = arena.numel() // max(distinct, 64)
    addresses = bench.addresses(distinct, tokens, record, k * n)
    x = torch.randn((tokens, k), device=bench.device)
    out = torch.zeros((tokens, n), device=bench.device)
    x, out = (x.to(bench.dtype), out) if shrinks else (x, out.to(bench.dtype))
    runs = [(t, 1, address, min(k, n)) for t, address in enumerate(addresses.tolist())]
    plan = make_tiles(runs)
    room = len(plan.starts) if tokens == PROMPT_TOKENS else tokens
    tiles = upload_tiles(plan, bench.device, room)
    moved = distinct * k * n * arena.element_size() + x.numel() * x.element_size()
    moved += (1 if shrinks else 2) * out.numel() * out.element_size()
    # A gathered copy of a prompt's matrices would not fit: there the baseline is dense or none.
    feasible = distinct == 1 or tokens * k * n <= 1 << 29

    def call() -> None:
        if shrinks:
            assert not isinstance(config, ExpandConfig)
            shrink(x, arena, tiles, out, modules=1, scale=0, alignment=16, config=config)
        else:
            assert not isinstance(config, ShrinkConfig)
            expand(x, arena, tiles, out, widths=(n,), scale=0, alignment=16, config=config)

    return bench.record(
        "grouped_matmul",
        case,
        {"tokens": tokens, "k": k, "n": n, "adapters": distinct},
        call,
        bytes_moved=moved,
        baseline=_baseline(x, arena, addresses, out, shrinks, distinct == 1 < tokens)
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
