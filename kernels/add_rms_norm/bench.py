"""Benchmark of ``add_rms_norm``: ``python -m shoal.kernels.add_rms_norm.bench [--check]``."""

from __future__ import annotations

import sys

import torch
from torch.nn import functional as F

from shoal.kernels.add_rms_norm.cases import CASES, make_inputs
from shoal.kernels.add_rms_norm.kernel import NormConfig, add_rms_norm, launch_add_rms_norm
from shoal.kernels.add_rms_norm.reference import add_rms_norm_reference
from shoal.kernels.benching import Bench, OpBench, Record, run
from shoal.kernels.launching import kernel_runs_on
from shoal.kernels.shapes import DECODE_TOKENS, LLAMA_3_1_8B, PROMPT_TOKENS, SMOLLM2_135M
from shoal.kernels.testing import TOLERANCE, max_error

SWEEP = tuple(NormConfig(warps) for warps in (2, 4, 8, 16))


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
            )
            for actual, wanted in ((out, expected_out), (residual, expected.residual)):
                errors[dtype] = max(errors[dtype], max_error(actual, wanted) / case.slack)
    return errors


def _record(bench: Bench, tokens: int, config: NormConfig | None = None) -> Record:
    n = (LLAMA_3_1_8B if bench.on_gpu else SMOLLM2_135M).hidden
    delta, residual = torch.randn((2, tokens, n), dtype=bench.dtype, device=bench.device)
    weight = torch.ones(n, device=bench.device)
    weight_16 = weight.to(bench.dtype)

    def torch_only() -> None:
        F.rms_norm(residual.add_(delta), (n,), weight_16, 1e-5)

    return bench.record(
        "add_rms_norm",
        "add and norm",
        {"tokens": tokens, "n": n},
        lambda: add_rms_norm(residual, weight, 1e-5, delta=delta, config=config),
        bytes_moved=4 * tokens * n * delta.element_size() + n * 4,
        baseline=None if config else ("torch", torch_only),
        config=config or "default",
    )


def measure(bench: Bench) -> list[Record]:
    """Decode batches and a prompt."""
    tokens = (*DECODE_TOKENS, PROMPT_TOKENS) if bench.on_gpu else (1, 64)
    return [_record(bench, count) for count in tokens]


def sweep(bench: Bench) -> list[Record]:
    """Every launch variant at a few points that bracket the use."""
    return [
        _record(bench, tokens, config) for tokens in (1, 32, 256, PROMPT_TOKENS) for config in SWEEP
    ]


BENCH = OpBench("add_rms_norm", check, measure, sweep)

if __name__ == "__main__":
    sys.exit(run([BENCH]))
