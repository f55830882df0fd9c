"""Benchmark of ``fold_sum``: ``python -m shoal.kernels.fold_sum.bench [--check] [--sweep]``."""

from __future__ import annotations

import sys

import torch

from shoal.kernels.benching import Bench, OpBench, Record, run
from shoal.kernels.fold_sum.cases import CASES, make_inputs, used_part
from shoal.kernels.fold_sum.kernel import FoldConfig, fold_sum, launch_fold_sum
from shoal.kernels.fold_sum.reference import fold_sum_reference
from shoal.kernels.launching import kernel_runs_on, power_of_two
from shoal.kernels.shapes import DECODE_TOKENS, LLAMA_3_1_8B, PROMPT_TOKENS, SMOLLM2_135M
from shoal.kernels.testing import TOLERANCE, max_error

SWEEP = tuple(FoldConfig(e, w) for e in (2048, 4096, 8192, 16384) for w in (2, 4, 8, 16))


def check(device: torch.device) -> dict[torch.dtype, float]:
    """Largest error over all cases (in units of their slack) and input dtypes; sums are float32."""
    op = launch_fold_sum if kernel_runs_on(device) else fold_sum
    worst = 0.0
    for case in CASES:
        if case.gpu_only and device.type == "cpu":
            continue
        for dtype in TOLERANCE:
            inputs = make_inputs(case, dtype, device, seed=7)
            expected = fold_sum_reference(*inputs)
            actual = used_part(op(*inputs), inputs.ranks)
            worst = max(worst, max_error(actual, expected) / case.slack)
    return {torch.float32: worst}


def _record(
    bench: Bench, case: str, tokens: int, width: int, rank: int, config: FoldConfig | None = None
) -> Record:
    x = torch.randn((tokens, width), dtype=bench.dtype, device=bench.device)
    ranks = torch.full((tokens,), rank, dtype=torch.int32, device=bench.device)
    columns = power_of_two(rank)
    # What the fold costs as a GEMM with its 0/1 matrix: how the widened base weight does it.
    pattern = (torch.arange(width)[:, None] % rank == torch.arange(rank)).to(x)
    return bench.record(
        "fold_sum",
        case,
        {"tokens": tokens, "width": width, "rank": rank},
        lambda: fold_sum(x, ranks, columns, config=config),
        bytes_moved=tokens * (width * x.element_size() + rank * 4),
        baseline=None if config else ("GEMM", lambda: x @ pattern),
        config=config or "default",
    )


def measure(bench: Bench) -> list[Record]:
    """Decode batches and a prompt, on the narrow and the wide input."""
    shape = LLAMA_3_1_8B if bench.on_gpu else SMOLLM2_135M
    token_counts = (*DECODE_TOKENS, PROMPT_TOKENS) if bench.on_gpu else (1, 64)
    rows = [
        _record(bench, name, tokens, width, 16)
        for name, width in (("hidden", shape.hidden), ("ffn", shape.ffn))
        for tokens in token_counts
    ]
    rows += [
        _record(bench, "hidden", token_counts[-1], shape.hidden, rank) for rank in (8, 32, 48, 64)
    ]
    return rows


def sweep(bench: Bench) -> list[Record]:
    """Every launch variant at a few points that bracket the use."""
    shape = LLAMA_3_1_8B
    points = (
        ("decode", 1, shape.hidden, 16),
        ("decode", 1, shape.ffn, 16),
        ("decode", 256, shape.hidden, 8),
        ("decode", 256, shape.ffn, 16),
        ("prompts", PROMPT_TOKENS, shape.hidden, 64),
        ("prompts", PROMPT_TOKENS, shape.ffn, 16),
    )
    return [_record(bench, *point, config) for point in points for config in SWEEP]


BENCH = OpBench("fold_sum", check, measure, sweep)

if __name__ == "__main__":
    sys.exit(run([BENCH]))
