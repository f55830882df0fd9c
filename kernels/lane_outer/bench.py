"""Benchmark of ``lane_outer``: ``python -m shoal.kernels.lane_outer.bench [--check]``."""

from __future__ import annotations

import sys

import torch

from shoal.kernels.benching import Bench, OpBench, Record, run
from shoal.kernels.lane_outer.cases import CASES, make_inputs
from shoal.kernels.lane_outer.kernel import LaneOuterConfig, lane_outer, launch_lane_outer
from shoal.kernels.lane_outer.reference import lane_outer_reference
from shoal.kernels.lane_rows import upload_rows
from shoal.kernels.launching import kernel_runs_on
from shoal.kernels.shapes import LLAMA_3_1_8B, SMOLLM2_135M
from shoal.kernels.testing import TOLERANCE, max_error

SWEEP = tuple(
    LaneOuterConfig(tile, 16, block_n, splits, warps)
    for tile in (32, 64, 128)
    for block_n in (16, 64, 128)
    for splits in (1, 4)
    for warps in (2, 4)
)


def check(device: torch.device) -> dict[torch.dtype, float]:
    """Largest error over all cases (in units of their slack) by dtype of the inputs."""
    op = launch_lane_outer if kernel_runs_on(device) else lane_outer
    worst = dict.fromkeys(TOLERANCE, 0.0)
    for case in CASES:
        if case.gpu_only and device.type == "cpu":
            continue
        for dtype in TOLERANCE:
            inputs = make_inputs(case, (dtype, dtype), device, seed=7)
            expected = inputs.grads.clone()
            lane_outer_reference(*inputs[:3], expected, scale=case.scale)
            op(*inputs, scale=case.scale)
            error = max_error(inputs.grads, expected) / case.slack
            worst[dtype] = max(worst[dtype], error)
    return worst


def _record(
    bench: Bench,
    case: str,
    lanes: int,
    rows: int,
    length: int,
    m: int,
    n: int,
    config: LaneOuterConfig | None = None,
) -> Record:
    a = torch.randn((rows, length, m), dtype=bench.dtype, device=bench.device)
    b = torch.randn((rows, length, n), dtype=bench.dtype, device=bench.device)
    grads = torch.zeros((lanes, m, n), device=bench.device)
    table = upload_rows([row * lanes // rows for row in range(rows)], bench.device, lanes)
    left, right = a.view(lanes, -1, m).transpose(1, 2), b.view(lanes, -1, n)
    return bench.record(
        "lane_outer",
        case,
        {"lanes": lanes, "rows": rows, "length": length, "m": m, "n": n},
        lambda: lane_outer(a[:, :, None], b[:, :, None], table, grads[:, None], config=config),
        bytes_moved=(a.numel() + b.numel()) * a.element_size() + grads.numel() * 4,
        baseline=None if config else ("bmm", lambda: torch.bmm(left, right)),
        config=config or "default",
    )


def measure(bench: Bench) -> list[Record]:
    """A fleet of one row each, of few lanes with many rows, and MiSS's wide gradient."""
    shape = LLAMA_3_1_8B if bench.on_gpu else SMOLLM2_135M
    lanes, length = (512, 128) if bench.on_gpu else (8, 32)
    return [
        _record(bench, "core r16", lanes, lanes, length, 16, 16),
        _record(bench, "core r64", lanes, lanes, length, 64, 64),
        _record(bench, "few lanes r16", lanes // 8, lanes, length, 16, 16),
        _record(bench, "fold r16", lanes, lanes, length, 16, shape.q),
    ]


def sweep(bench: Bench) -> list[Record]:
    """Every launch variant for the core, of many lanes and of few."""
    points = (("core r16", 512, 512, 128, 16, 16), ("few lanes r16", 16, 512, 128, 16, 16))
    return [_record(bench, *point, config) for point in points for config in SWEEP]


BENCH = OpBench("lane_outer", check, measure, sweep)

if __name__ == "__main__":
    sys.exit(run([BENCH]))
