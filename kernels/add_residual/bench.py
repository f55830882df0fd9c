"""Benchmark of ``add_residual``: ``python -m shoal.kernels.add_residual.bench [--check]``."""

from __future__ import annotations

import sys

import torch
from torch.nn import functional as F

from shoal.kernels.add_residual.cases import CASES, make_inputs
from shoal.kernels.add_residual.kernel import add_residual, default_config, launch_add_residual
from shoal.kernels.add_residual.reference import add_residual_reference
from shoal.kernels.benching import Bench, OpBench, Record, run
from shoal.kernels.core_apply.epilogue_bench import (
    SWEPT,
    SWEPT_PROMPTS,
    SWEPT_WITHOUT,
    Point,
    applied_apart,
    bench_core,
    points,
    widened,
)
from shoal.kernels.launching import TileConfig, kernel_runs_on
from shoal.kernels.shapes import LLAMA_3_1_8B, SMOLLM2_135M
from shoal.kernels.testing import TOLERANCE, max_error

# At least 256 columns: more than 16 parts cost the reader of the sums.
SWEEP = tuple(TileConfig(16, n, w) for n in (256, 512) for w in (4, 8))
SWEEP_PROMPTS = tuple(TileConfig(t, 256, w) for t in (16, 32, 64) for w in (4, 8))
SWEEP_WITHOUT = tuple(TileConfig(t, n, 4) for t in (1, 4, 16) for n in (256, 512))


def check(device: torch.device) -> dict[torch.dtype, float]:
    """Largest error over all cases in units of a case's slack, by dtype."""
    op = launch_add_residual if kernel_runs_on(device) else add_residual
    errors = dict.fromkeys(TOLERANCE, 0.0)
    for case in CASES:
        if case.gpu_only and device.type == "cpu":
            continue
        for dtype in TOLERANCE:
            inputs = make_inputs(case, dtype, device, seed=7)
            before = inputs.residual.clone()
            x, sums = op(*inputs[:3], bias=inputs.bias, core=inputs.core)
            expected = add_residual_reference(
                before, *inputs[1:], default_config(case.tokens, case.n, inputs.core).block_n
            )
            for actual, wanted in zip((inputs.residual, x, sums), (before, *expected), strict=True):
                errors[dtype] = max(errors[dtype], max_error(actual, wanted) / case.slack)
    return errors


def _record(bench: Bench, point: Point, config: TileConfig | None = None) -> Record:
    shape = LLAMA_3_1_8B if bench.on_gpu else SMOLLM2_135M
    tokens, n = point.tokens, shape.hidden
    delta = widened(bench, tokens, n)
    residual = torch.randn((tokens, n), dtype=bench.dtype, device=bench.device)
    weight = torch.ones(n, device=bench.device)
    weight_16 = weight.to(bench.dtype)
    made = bench_core(bench, shape, point, (n,))
    core = made.epilogue if made else None

    def whole_norm() -> None:
        F.rms_norm(residual.add_(delta[:, :n]), (n,), weight_16, 1e-5)

    apart = applied_apart(delta, made, (n,)) if made else whole_norm

    def another_launch() -> None:
        apart()
        add_residual(residual, delta, weight)

    moved = 4 * tokens * n * delta.element_size() + n * 4
    baseline = ("core_apply first", another_launch) if made else ("torch", whole_norm)
    return bench.record(
        "add_residual",
        point.case,
        {"tokens": tokens, "n": n, "rank": point.columns, "adapters": point.distinct},
        lambda: add_residual(residual, delta, weight, core=core, config=config),
        bytes_moved=moved + (made.bytes if made else 0),
        baseline=None if config else baseline,
        config=config or "default",
    )


def measure(bench: Bench) -> list[Record]:
    """Decode batches and a prompt: without adapters, and with all-different and shared ones."""
    return [_record(bench, point) for point in points(bench.on_gpu)]


def sweep(bench: Bench) -> list[Record]:
    """Every launch variant at a few points that bracket the use."""
    rows = [_record(bench, point, config) for point in SWEPT for config in SWEEP]
    rows += [_record(bench, point, config) for point in SWEPT_PROMPTS for config in SWEEP_PROMPTS]
    return rows + [
        _record(bench, point, config) for point in SWEPT_WITHOUT for config in SWEEP_WITHOUT
    ]


BENCH = OpBench("add_residual", check, measure, sweep)

if __name__ == "__main__":
    sys.exit(run([BENCH]))
