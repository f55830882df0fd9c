"""Benchmark of ``core_apply``: ``python -m shoal.kernels.core_apply.bench [--check] [--sweep]``."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from shoal.kernels.benching import Bench, OpBench, Record, run
from shoal.kernels.core_apply.cases import CASES, Inputs, make_inputs
from shoal.kernels.core_apply.kernel import CoreConfig, core_apply, launch_core_apply
from shoal.kernels.core_apply.reference import core_apply_reference
from shoal.kernels.launching import kernel_runs_on
from shoal.kernels.shapes import DECODE_TOKENS, LLAMA_3_1_8B, PROMPT_TOKENS, SMOLLM2_135M
from shoal.kernels.testing import TOLERANCE, max_error

SWEEP = (
    *(CoreConfig("fused", n, 16, w) for n in (64, 128, 256, 512) for w in (4, 8)),
    CoreConfig("two_step", tile=1, num_warps=1),
    CoreConfig("two_step", tile=4, num_warps=4),
    CoreConfig("two_step", tile=16, num_warps=4),
)


def check(device: torch.device) -> dict[torch.dtype, float]:
    """Largest error over all cases in units of a case's slack, by dtype."""
    op = launch_core_apply if kernel_runs_on(device) else core_apply
    errors = dict.fromkeys(TOLERANCE, 0.0)
    for case in CASES:
        if case.gpu_only and device.type == "cpu":
            continue
        for dtype in TOLERANCE:
            inputs = make_inputs(case, dtype, device, seed=7)
            expected = inputs._replace(y=inputs.y.clone())
            core_apply_reference(*expected)
            op(*inputs, alignment=case.alignment)
            errors[dtype] = max(errors[dtype], max_error(inputs.y, expected.y) / case.slack)
    return errors


def _inputs(bench: Bench, tokens: int, n: int, rank: int, distinct: int) -> Inputs:
    shape = LLAMA_3_1_8B if bench.on_gpu else SMOLLM2_135M
    record = shape.layers * 7 * rank * rank

    def normal(*size: int) -> Tensor:
        return torch.randn(size, dtype=bench.dtype, device=bench.device) * 0.02

    return Inputs(
        normal(tokens, n),
        normal(tokens, rank),
        bench.arena(),
        bench.addresses(distinct, tokens, record, rank * rank),
        torch.full((tokens,), rank, dtype=torch.int32, device=bench.device),
        normal(n, rank),
    )


def _baseline(inputs: Inputs, rank: int, shared: bool) -> tuple[str, Callable[[], object]]:
    """Plain torch: gather and bmm; or two dense products when all tokens share one adapter."""
    y, h, arena, addresses, _, basis = inputs
    size = rank * rank
    if shared:
        only = arena[int(addresses[0]) :][:size].view(rank, rank)
        return "dense", lambda: y.addmm_(h @ only.t(), basis.t())
    bank = arena.as_strided(((arena.numel() - size) // 16 + 1, size), (16, 1))
    places = addresses // 16

    def gather() -> None:
        matrices = bank.index_select(0, places).view(-1, rank, rank)
        y.addmm_(torch.bmm(matrices, h[:, :, None]).squeeze(2), basis.t())

    return "gather+bmm", gather


def _record(
    bench: Bench,
    case: str,
    tokens: int,
    n: int,
    rank: int,
    distinct: int,
    config: CoreConfig | None = None,
) -> Record:
    inputs = _inputs(bench, tokens, n, rank, distinct)
    moved = tokens * (rank + 2 * n) + distinct * rank * rank + n * rank
    return bench.record(
        "core_apply",
        case,
        {"tokens": tokens, "n": n, "rank": rank, "adapters": distinct},
        lambda: core_apply(*inputs, alignment=8, config=config),
        bytes_moved=moved * bench.dtype.itemsize,
        baseline=None if config else _baseline(inputs, rank, distinct == 1 < tokens),
        config=config or "default",
    )


def measure(bench: Bench) -> list[Record]:
    """Decode batches with all-different and with shared adapters, and prompts."""
    shape = LLAMA_3_1_8B if bench.on_gpu else SMOLLM2_135M
    token_counts = DECODE_TOKENS if bench.on_gpu else (1, 64)
    rows = []
    for name, n in (("q", shape.q), ("kv", shape.kv), ("ffn", shape.ffn)):
        for tokens in token_counts:
            rows.append(_record(bench, f"{name}, all differ", tokens, n, 16, tokens))
        rows.append(_record(bench, f"{name}, one shared", token_counts[-1], n, 16, 1))
    for rank in (8, 32, 64):
        for tokens in (token_counts[0], token_counts[-1]):
            rows.append(_record(bench, "q, all differ", tokens, shape.q, rank, tokens))
    if bench.on_gpu:
        for rank in (16, 64):
            for distinct in (1, 8):
                rows.append(_record(bench, "prompts, q", PROMPT_TOKENS, shape.q, rank, distinct))
    return rows


def sweep(bench: Bench) -> list[Record]:
    """Every launch variant at a few points that bracket the use."""
    shape = LLAMA_3_1_8B
    points = (
        ("decode", 1, shape.q, 16, 1),
        ("decode", 32, shape.q, 16, 32),
        ("decode", 256, shape.q, 16, 256),
        ("decode", 256, shape.ffn, 16, 256),
        ("decode", 32, shape.q, 32, 32),
        ("prompts", PROMPT_TOKENS, shape.ffn, 32, 4),
        ("decode", 1, shape.ffn, 64, 1),
        ("decode", 32, shape.ffn, 64, 32),
        ("decode", 256, shape.q, 64, 256),
        ("prompts", 512, shape.q, 16, 4),
        ("prompts", 512, shape.ffn, 64, 4),
        ("prompts", PROMPT_TOKENS, shape.q, 16, 4),
        ("prompts", PROMPT_TOKENS, shape.ffn, 64, 4),
    )
    return [_record(bench, *point, config) for point in points for config in SWEEP]


BENCH = OpBench("core_apply", check, measure, sweep)

if __name__ == "__main__":
    sys.exit(run([BENCH]))
