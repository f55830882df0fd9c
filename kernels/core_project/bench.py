"""Benchmark of both entries: ``python -m shoal.kernels.core_project.bench [--check] [--sweep]``."""

from __future__ import annotations

import sys

import torch
from torch.nn import functional as F

from shoal.kernels.benching import Bench, OpBench, Record, run
from shoal.kernels.core_apply.epilogue_bench import bench_rows, widened
from shoal.kernels.core_project.cases import CASES, make_mix_inputs, make_project_inputs
from shoal.kernels.core_project.kernel import (
    MixConfig,
    ProjectConfig,
    core_mix,
    core_project,
    default_project_config,
    launch_core_mix,
    launch_core_project,
)
from shoal.kernels.core_project.reference import core_mix_reference, core_project_reference
from shoal.kernels.launching import kernel_runs_on
from shoal.kernels.shapes import LLAMA_3_1_8B, PROMPT_TOKENS, SMOLLM2_135M
from shoal.kernels.testing import TOLERANCE, max_error

MODULES = 2  # gate and up: the GEMM that is better not widened
SWEEP = tuple(ProjectConfig(s, 128, w) for s in (2, 4, 8, 16) for w in (4, 8))
MIX_SWEEP = tuple(MixConfig(t, w) for t in (1, 4, 16) for w in (1, 4))


def check(device: torch.device) -> dict[torch.dtype, float]:
    """Largest error over all cases in units of a case's slack, by dtype."""
    runs = kernel_runs_on(device)
    project = launch_core_project if runs else core_project
    mix = launch_core_mix if runs else core_mix
    errors = dict.fromkeys(TOLERANCE, 0.0)
    for case in CASES:
        if case.gpu_only and device.type == "cpu":
            continue
        for dtype in TOLERANCE:
            x = make_project_inputs(case, dtype, device, seed=7)
            y = make_mix_inputs(case, dtype, device, seed=7)
            found = project(*x[:3], modules=x.modules, matrix=x.matrix).sum(dim=0)
            mixed = mix(*y[:3], modules=y.modules, matrix=y.matrix)[0]
            pairs = (
                (found, core_project_reference(*x)[0]),
                (mixed, core_mix_reference(*y)[0]),
            )
            for actual, wanted in pairs:
                errors[dtype] = max(errors[dtype], max_error(actual, wanted) / case.slack)
    return errors


def _project(
    bench: Bench, tokens: int, columns: int, config: ProjectConfig | None = None
) -> Record:
    shape = LLAMA_3_1_8B if bench.on_gpu else SMOLLM2_135M
    k = shape.hidden
    x = torch.randn((tokens, k), dtype=bench.dtype, device=bench.device)
    a = torch.randn((MODULES * columns, k), dtype=bench.dtype, device=bench.device) * 0.02
    rows = bench_rows(bench, shape, tokens, tokens, columns, MODULES)
    read = tokens * k + a.numel() + tokens * MODULES * columns**2
    splits = (config or default_project_config(columns, tokens, bench.dtype)).splits
    return bench.record(
        "core_project",
        "core_project, all differ",
        {"tokens": tokens, "k": k, "rank": columns, "modules": MODULES},
        lambda: core_project(x, a, rows, modules=MODULES, matrix=0, config=config),
        bytes_moved=read * x.element_size() + splits * tokens * MODULES * columns * 4,
        baseline=None if config else ("h alone", lambda: F.linear(x, a)),
        config=config or "default",
    )


def _mix(bench: Bench, tokens: int, columns: int, config: MixConfig | None = None) -> Record:
    shape = LLAMA_3_1_8B if bench.on_gpu else SMOLLM2_135M
    y = widened(bench, tokens, shape.hidden)
    distinct = min(8, tokens)
    rows = bench_rows(bench, shape, tokens, distinct, columns, MODULES)
    moved = (tokens * columns + distinct * columns**2) * y.element_size() + tokens * columns * 4
    return bench.record(
        "core_project",
        "core_mix, shared",
        {"tokens": tokens, "rank": columns, "modules": MODULES, "adapters": distinct},
        lambda: core_mix(y, shape.hidden, rows, modules=MODULES, matrix=0, config=config),
        bytes_moved=MODULES * moved,
        config=config or "default",
    )


def measure(bench: Bench) -> list[Record]:
    """Decode batches of all-different adapters; prompts of eight."""
    tokens = (16, 32, 64, 128, 256) if bench.on_gpu else (1, 64)
    rows = [_project(bench, count, 16) for count in tokens]
    rows += [_project(bench, tokens[-1], columns) for columns in (32, 64)]
    prompt = PROMPT_TOKENS if bench.on_gpu else 64
    return rows + [_mix(bench, prompt, columns) for columns in (16, 32, 64)]


def sweep(bench: Bench) -> list[Record]:
    """Every launch variant at a few points that bracket the use."""
    rows = [
        _project(bench, tokens, columns, config)
        for tokens, columns in ((32, 16), (128, 16), (256, 16), (256, 64))
        for config in SWEEP
    ]
    return rows + [
        _mix(bench, PROMPT_TOKENS, columns, config) for columns in (16, 64) for config in MIX_SWEEP
    ]


BENCH = OpBench("core_project", check, measure, sweep)

if __name__ == "__main__":
    sys.exit(run([BENCH]))
