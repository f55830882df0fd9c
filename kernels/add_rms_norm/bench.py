"""Benchmark of ``add_rms_norm``: ``python -m shoal.kernels.add_rms_norm.bench [--check]``."""

from __future__ import annotations

import sys

import torch
from torch.nn import functional as F

from shoal.kernels.add_rms_norm.cases import CASES, make_inputs
from shoal.kernels.add_rms_norm.kernel import NormConfig, add_rms_norm, launch_add_rms_norm
from shoal.kernels.add_rms_norm.reference import add_rms_norm_reference
from shoal.kernels.benching import Bench, OpBench, Record, run
from shoal.kernels.core_apply.epilogue_bench import applied_apart, bench_core, core_bytes, widened
from shoal.kernels.launching import kernel_runs_on
from shoal.kernels.shapes import DECODE_TOKENS, LLAMA_3_1_8B, PROMPT_TOKENS, SMOLLM2_135M
from shoal.kernels.testing import TOLERANCE, max_error

SWEEP = tuple(NormConfig(rows, warps) for rows in (1, 2, 4, 8) for warps in (4, 8, 16))


def check(device: torch.device) -> dict[torch.dtype, float]:
    """Largest error over all cases in units of a case's slack, by dtype."""
    op = launch_add_rms_norm if kernel_runs_on(device) else add_rms_norm
    errors = dict.fromkeys(TOLERANCE, 0.0)
    for case in CASES:
        if case.gpu_only and device.type == "cpu":
            continue
        for dtype in TOLERANCE:
            inputs = make_inputs(case, dtype, device, seed=7)
            expected = inputs._replace(residual=inputs.residual.clone())
            expected_out = add_rms_norm_reference(*expected)
            residual, weight, eps, *_ = inputs
            out = op(
                residual,
                weight,
                eps,
                delta=inputs.delta,
                branch=inputs.branch,
                bias=inputs.bias,
                delta_weight=inputs.delta_weight,
                plus_one=inputs.plus_one,
                core=inputs.core,
                config=case.config,
            )
            for actual, wanted in ((out, expected_out), (residual, expected.residual)):
                errors[dtype] = max(errors[dtype], max_error(actual, wanted) / case.slack)
    return errors


def _record(
    bench: Bench,
    case: str,
    tokens: int,
    rank: int,
    distinct: int,
    config: NormConfig | None = None,
) -> Record:
    """One row; rank 0: without adapters."""
    shape = LLAMA_3_1_8B if bench.on_gpu else SMOLLM2_135M
    n = shape.hidden
    delta = widened(bench, tokens, n)
    residual = torch.randn((tokens, n), dtype=bench.dtype, device=bench.device)
    weight = torch.ones(n, device=bench.device)
    weight_16 = weight.to(bench.dtype)
    core = bench_core(bench, shape, tokens, distinct, rank, (n,)) if rank else None

    def torch_only() -> None:
        F.rms_norm(residual.add_(delta[:, :n]), (n,), weight_16, 1e-5)

    apart = applied_apart(delta, core, (n,)) if core else torch_only

    def another_launch() -> None:
        apart()
        add_rms_norm(residual, weight, 1e-5, delta=delta)

    baseline = ("core_apply first", another_launch) if core else ("torch", torch_only)
    moved = 4 * tokens * n * delta.element_size() + n * 4
    return bench.record(
        "add_rms_norm",
        case,
        {"tokens": tokens, "n": n, "rank": rank, "adapters": distinct},
        lambda: add_rms_norm(residual, weight, 1e-5, delta=delta, core=core, config=config),
        bytes_moved=moved + (core_bytes(core, distinct, 1) if core else 0),
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
    points += [(1, 0, 0), (256, 0, 0), (PROMPT_TOKENS, 0, 0), (PROMPT_TOKENS, 16, 8)]
    return [
        _record(bench, "core" if point[1] else "no adapters", *point, config)
        for point in points
        for config in SWEEP
    ]


BENCH = OpBench("add_rms_norm", check, measure, sweep)

if __name__ == "__main__":
    sys.exit(run([BENCH]))
