"""Benchmark of ``scale_outputs``: ``python -m shoal.kernels.scale_outputs.bench [--check]``."""

from __future__ import annotations

import sys

import torch

from shoal.kernels.benching import Bench, OpBench, Record, run
from shoal.kernels.launching import kernel_runs_on
from shoal.kernels.scale_outputs.cases import CASES, make_inputs
from shoal.kernels.scale_outputs.kernel import ScaleConfig, launch_scale_outputs, scale_outputs
from shoal.kernels.scale_outputs.reference import scale_outputs_reference
from shoal.kernels.shapes import DECODE_TOKENS, LLAMA_3_1_8B, PROMPT_TOKENS, SMOLLM2_135M
from shoal.kernels.testing import TOLERANCE, max_error

SWEEP = tuple(ScaleConfig(n, w) for n in (512, 1024, 2048, 4096) for w in (2, 4, 8))


def check(device: torch.device) -> dict[torch.dtype, float]:
    """Largest error over all cases, by dtype."""
    op = launch_scale_outputs if kernel_runs_on(device) else scale_outputs
    errors = dict.fromkeys(TOLERANCE, 0.0)
    for case in CASES:
        if case.gpu_only and device.type == "cpu":
            continue
        for dtype in TOLERANCE:
            y, arena, addresses, offset, alignment = make_inputs(case, dtype, device, seed=7)
            expected = y.clone()
            scale_outputs_reference(expected, arena, addresses, offset)
            op(y, arena, addresses, offset=offset, alignment=alignment)
            errors[dtype] = max(errors[dtype], max_error(y, expected))
    return errors


def _record(
    bench: Bench, tokens: int, n: int, distinct: int, config: ScaleConfig | None = None
) -> Record:
    arena = bench.arena()
    addresses = bench.addresses(distinct, tokens, arena.numel() // max(distinct, 64), n)
    y = torch.ones((tokens, n), dtype=bench.dtype, device=bench.device)
    rows = arena.as_strided(((arena.numel() - n) // 16 + 1, n), (16, 1))
    places = addresses // 16
    return bench.record(
        "scale_outputs",
        "decode" if tokens < PROMPT_TOKENS else "prompts",
        {"tokens": tokens, "n": n, "adapters": distinct},
        lambda: scale_outputs(y, arena, addresses, offset=0, alignment=16, config=config),
        bytes_moved=(2 * tokens + distinct) * n * y.element_size(),
        baseline=None if config else ("gather", lambda: y.mul_(1 + rows.index_select(0, places))),
        config=config or "default",
    )


def measure(bench: Bench) -> list[Record]:
    """Decode batches with all-different and with shared adapters, and prompts."""
    shape = LLAMA_3_1_8B if bench.on_gpu else SMOLLM2_135M
    token_counts = DECODE_TOKENS if bench.on_gpu else (1, 64)
    widths = (shape.hidden, 2 * shape.ffn)
    rows = [_record(bench, tokens, n, tokens) for n in widths for tokens in token_counts]
    rows += [_record(bench, token_counts[-1], n, 1) for n in widths]
    if bench.on_gpu:
        rows += [_record(bench, PROMPT_TOKENS, n, 8) for n in widths]
    return rows


def sweep(bench: Bench) -> list[Record]:
    """Every launch variant at a few points that bracket the use."""
    shape = LLAMA_3_1_8B
    points = (
        (1, shape.hidden, 1),
        (32, 2 * shape.ffn, 32),
        (256, shape.hidden, 256),
        (256, 2 * shape.ffn, 256),
        (PROMPT_TOKENS, 2 * shape.ffn, 8),
    )
    return [_record(bench, *point, config) for point in points for config in SWEEP]


BENCH = OpBench("scale_outputs", check, measure, sweep)

if __name__ == "__main__":
    sys.exit(run([BENCH]))
