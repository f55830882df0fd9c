"""Benchmark of ``lane_matmul``: ``python -m shoal.kernels.lane_matmul.bench [--check]``."""

from __future__ import annotations

import sys

import torch

from shoal.kernels.benching import Bench, OpBench, Record, run
from shoal.kernels.lane_matmul.cases import CASES, make_inputs
from shoal.kernels.lane_matmul.kernel import LaneMatmulConfig, lane_matmul, launch_lane_matmul
from shoal.kernels.lane_matmul.reference import lane_matmul_reference
from shoal.kernels.launching import kernel_runs_on
from shoal.kernels.shapes import LLAMA_3_1_8B, SMOLLM2_135M
from shoal.kernels.testing import TOLERANCE, max_error

SWEEP = tuple(
    LaneMatmulConfig(tile, 16, block_n, warps)
    for tile in (32, 64, 128)
    for block_n in (16, 64, 128, 256)
    for warps in (2, 4, 8)
)


def check(device: torch.device) -> dict[torch.dtype, float]:
    """Largest error over all cases (in units of their slack) by dtype."""
    op = launch_lane_matmul if kernel_runs_on(device) else lane_matmul
    worst = dict.fromkeys(TOLERANCE, 0.0)
    for case in CASES:
        if case.gpu_only and device.type == "cpu":
            continue
        for dtype in TOLERANCE:
            inputs = make_inputs(case, dtype, device, seed=7)
            expected = inputs.out.clone()
            lane_matmul_reference(*inputs[:3], expected, scale=case.scale, add=case.add)
            op(*inputs, scale=case.scale, add=case.add)
            error = max_error(inputs.out, expected) / case.slack
            worst[dtype] = max(worst[dtype], error)
    return worst


def _record(
    bench: Bench,
    case: str,
    rows: int,
    length: int,
    k: int,
    n: int,
    *,
    add: bool = False,
    config: LaneMatmulConfig | None = None,
) -> Record:
    x = torch.randn((rows, length, k), dtype=bench.dtype, device=bench.device)
    bank = torch.randn((rows, k, n), device=bench.device) * k**-0.5
    owners = torch.arange(rows, dtype=torch.int32, device=bench.device)
    out = torch.zeros((rows, length, n), dtype=bench.dtype, device=bench.device)
    half = bank.to(bench.dtype)
    moved = (x.numel() + (2 if add else 1) * out.numel()) * x.element_size() + bank.numel() * 4
    plain = (lambda: out.baddbmm_(x, half)) if add else (lambda: torch.bmm(x, half, out=out))
    return bench.record(
        "lane_matmul",
        case,
        {"rows": rows, "length": length, "k": k, "n": n},
        lambda: lane_matmul(
            x[:, :, None], bank[:, None], owners, out[:, :, None], add=add, config=config
        ),
        bytes_moved=moved,
        baseline=None if config else ("bmm", plain),
        config=config or "default",
    )


def measure(bench: Bench) -> list[Record]:
    """A fleet of one row each: the core, MiSS's expand, and the shrink of its backward."""
    shape = LLAMA_3_1_8B if bench.on_gpu else SMOLLM2_135M
    rows, length = (512, 128) if bench.on_gpu else (8, 32)
    return [
        _record(bench, "core r16", rows, length, 16, 16),
        _record(bench, "core r64", rows, length, 64, 64),
        _record(bench, "expand r16", rows, length, 16, shape.q, add=True),
        _record(bench, "shrink r16", rows, length, shape.q, 16),
        _record(bench, "core r16", 64, length, 16, 16),
    ]


def sweep(bench: Bench) -> list[Record]:
    """Every launch variant for the core and for MiSS's expand."""
    points = (("core r16", 512, 128, 16, 16, False), ("expand r16", 512, 128, 16, 4096, True))
    return [
        _record(bench, name, rows, length, k, n, add=add, config=config)
        for name, rows, length, k, n, add in points
        for config in SWEEP
        if config.block_n <= max(16, n)
    ]


BENCH = OpBench("lane_matmul", check, measure, sweep)

if __name__ == "__main__":
    sys.exit(run([BENCH]))
