"""Benchmark of ``silu_mul``: ``python -m shoal.kernels.silu_mul.bench [--check] [--sweep]``."""

from __future__ import annotations

import sys

import torch
from torch.nn import functional as F

from shoal.kernels.benching import Bench, OpBench, Record, run
from shoal.kernels.core_apply.epilogue_bench import (
    PROMPT_TILES,
    SWEPT,
    SWEPT_PROMPTS,
    SWEPT_WITHOUT,
    TILES,
    Point,
    applied_apart,
    bench_core,
    bench_scale,
    points,
    widened,
)
from shoal.kernels.launching import TileConfig, kernel_runs_on
from shoal.kernels.shapes import LLAMA_3_1_8B, SMOLLM2_135M
from shoal.kernels.silu_mul.cases import CASES, make_inputs
from shoal.kernels.silu_mul.kernel import launch_silu_mul, silu_mul
from shoal.kernels.silu_mul.reference import silu_mul_reference
from shoal.kernels.testing import TOLERANCE, max_error

SWEEP_WITHOUT = (
    *(TileConfig(1, n, w) for n in (512, 1024) for w in (4, 8)),
    TileConfig(1, 2048, 8),
    TileConfig(4, 512, 8),
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
            gate_up, width, activation, bias, core, scale = inputs
            actual = op(gate_up, width, activation=activation, bias=bias, core=core, scale=scale)
            error = max_error(actual, silu_mul_reference(*inputs)) / case.slack
            errors[dtype] = max(errors[dtype], error)
    return errors


def _record(bench: Bench, point: Point, config: TileConfig | None = None) -> Record:
    shape = LLAMA_3_1_8B if bench.on_gpu else SMOLLM2_135M
    tokens, f = point.tokens, shape.ffn
    gate_up = widened(bench, tokens, 2 * f)
    made = bench_core(bench, shape, point, (f, f))
    core = made.epilogue if made else None
    scale = bench_scale(bench, tokens, shape.hidden)

    def torch_only() -> None:
        F.silu(gate_up[:, :f]) * gate_up[:, f : 2 * f]

    apart = applied_apart(gate_up, made, (f, f)) if made else torch_only

    def two_more_launches() -> None:
        apart()
        silu_mul(gate_up, f, scale=scale)

    baseline = ("core_apply first", two_more_launches) if made else ("torch", torch_only)
    moved = 3 * tokens * f * gate_up.element_size()
    return bench.record(
        "silu_mul",
        point.case,
        {"tokens": tokens, "width": f, "rank": point.columns, "adapters": point.distinct},
        lambda: silu_mul(gate_up, f, core=core, scale=scale, config=config),
        bytes_moved=moved + (made.bytes if made else 0),
        baseline=None if config else baseline,
        config=config or "default",
    )


def measure(bench: Bench) -> list[Record]:
    """Decode batches and a prompt: without adapters, and with all-different and shared ones."""
    return [_record(bench, point) for point in points(bench.on_gpu)]


def sweep(bench: Bench) -> list[Record]:
    """Every launch variant at a few points that bracket the use."""
    rows = [_record(bench, point, config) for point in SWEPT for config in TILES]
    rows += [_record(bench, point, config) for point in SWEPT_PROMPTS for config in PROMPT_TILES]
    return rows + [
        _record(bench, point, config) for point in SWEPT_WITHOUT for config in SWEEP_WITHOUT
    ]


BENCH = OpBench("silu_mul", check, measure, sweep)

if __name__ == "__main__":
    sys.exit(run([BENCH]))
