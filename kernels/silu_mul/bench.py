"""Benchmark of ``silu_mul``: ``python -m shoal.kernels.silu_mul.bench [--check] [--sweep]``."""

from __future__ import annotations

import sys

import torch
from torch.nn import functional as F

from shoal.kernels.benching import Bench, OpBench, Record, run
from shoal.kernels.core_apply.epilogue_bench import applied_apart, bench_core, core_bytes, widened
from shoal.kernels.launching import kernel_runs_on
from shoal.kernels.shapes import DECODE_TOKENS, LLAMA_3_1_8B, PROMPT_TOKENS, SMOLLM2_135M
from shoal.kernels.silu_mul.cases import CASES, make_inputs
from shoal.kernels.silu_mul.kernel import SiluConfig, launch_silu_mul, silu_mul
from shoal.kernels.silu_mul.reference import silu_mul_reference
from shoal.kernels.testing import TOLERANCE, max_error

SWEEP = tuple(SiluConfig(16, n, w) for n in (64, 128, 256, 512) for w in (4, 8))
SWEEP_WITHOUT = tuple(
    SiluConfig(t, n, w) for t in (1, 2) for n in (512, 1024, 2048) for w in (4, 8)
)


def check(device: torch.device) -> dict[torch.dtype, float]:
    """Largest error over all cases in units of a case's slack, by dtype."""
    op = launch_silu_mul if kernel_runs_on(device) else silu_mul
    errors = dict.fromkeys(TOLERANCE, 0.0)
    for case in CASES:
        if case.gpu_only and device.type == "cpu":
            continue
        for dtype in TOLERANCE:
            inputs = make_inputs(case, dtype, device, seed=7)
            gate_up, width, activation, bias, core = inputs
            actual = op(gate_up, width, activation=activation, bias=bias, core=core)
            error = max_error(actual, silu_mul_reference(*inputs)) / case.slack
            errors[dtype] = max(errors[dtype], error)
    return errors


def _record(
    bench: Bench,
    case: str,
    tokens: int,
    rank: int,
    distinct: int,
    config: SiluConfig | None = None,
) -> Record:
    """One row; rank 0: without adapters."""
    shape = LLAMA_3_1_8B if bench.on_gpu else SMOLLM2_135M
    f = shape.ffn
    gate_up = widened(bench, tokens, 2 * f)
    core = bench_core(bench, shape, tokens, distinct, rank, (f, f)) if rank else None

    def torch_only() -> None:
        F.silu(gate_up[:, :f]) * gate_up[:, f : 2 * f]

    apart = applied_apart(gate_up, core, (f, f)) if core else torch_only

    def two_more_launches() -> None:
        apart()
        silu_mul(gate_up, f)

    baseline = ("core_apply first", two_more_launches) if core else ("torch", torch_only)
    moved = 3 * tokens * f * gate_up.element_size()
    return bench.record(
        "silu_mul",
        case,
        {"tokens": tokens, "width": f, "rank": rank, "adapters": distinct},
        lambda: silu_mul(gate_up, f, core=core, config=config),
        bytes_moved=moved + (core_bytes(core, distinct, 2) if core else 0),
        baseline=None if config else baseline,
        config=config or "default",
    )


def measure(bench: Bench) -> list[Record]:
    """Decode batches and a prompt: without adapters, and with all-different and shared ones."""
    token_counts = DECODE_TOKENS if bench.on_gpu else (1, 64)
    last = token_counts[-1]
    rows = [_record(bench, "no adapters", tokens, 0, 0) for tokens in token_counts]
    rows += [_record(bench, "all differ", tokens, 16, tokens) for tokens in token_counts]
    rows += [_record(bench, "all differ", tokens, 32, tokens) for tokens in (token_counts[0], last)]
    rows.append(_record(bench, "one shared", last, 16, 1))
    if bench.on_gpu:
        rows += [_record(bench, "prompts", PROMPT_TOKENS, rank, 8) for rank in (0, 16, 32)]
    return rows


def sweep(bench: Bench) -> list[Record]:
    """Every launch variant at a few points that bracket the use."""
    points = [(1, 16, 1), (32, 16, 32), (128, 16, 128), (256, 16, 256), (256, 32, 256)]
    points.append((PROMPT_TOKENS, 16, 8))
    rows = [_record(bench, "core", *point, config) for point in points for config in SWEEP]
    return rows + [
        _record(bench, "no adapters", tokens, 0, 0, config)
        for tokens in (1, 32, 256, PROMPT_TOKENS)
        for config in SWEEP_WITHOUT
    ]


BENCH = OpBench("silu_mul", check, measure, sweep)

if __name__ == "__main__":
    sys.exit(run([BENCH]))
