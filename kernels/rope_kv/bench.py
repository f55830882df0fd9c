"""Benchmark of ``rope_kv``: ``python -m shoal.kernels.rope_kv.bench [--check] [--sweep]``."""

from __future__ import annotations

import sys

import torch

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
from shoal.kernels.rope_kv.cases import CASES, make_inputs
from shoal.kernels.rope_kv.kernel import launch_rope_kv, rope_kv
from shoal.kernels.rope_kv.reference import rope_kv_reference, rotation_table
from shoal.kernels.shapes import LLAMA_3_1_8B, SMOLLM2_135M
from shoal.kernels.testing import TOLERANCE, max_error

SWEEP_WITHOUT = (
    *(TileConfig(1, n, 4) for n in (512, 1024)),
    *(TileConfig(4, n, w) for n in (256, 512) for w in (4, 8)),
)
BLOCK_TOKENS = 16
POSITIONS = 4096


def check(device: torch.device) -> dict[torch.dtype, float]:
    """Largest error over all cases in units of a case's slack, by dtype."""
    op = launch_rope_kv if kernel_runs_on(device) else rope_kv
    errors = dict.fromkeys(TOLERANCE, 0.0)
    for case in CASES:
        if case.gpu_only and device.type == "cpu":
            continue
        for dtype in TOLERANCE:
            inputs = make_inputs(case, dtype, device, seed=7)
            keys, values = inputs.key_cache.clone(), inputs.value_cache.clone()
            expected = rope_kv_reference(*inputs._replace(key_cache=keys, value_cache=values))
            actual = op(
                *inputs[:7],
                q_norm=inputs.q_norm,
                k_norm=inputs.k_norm,
                eps=inputs.eps,
                bias=inputs.bias,
                kv_limit=inputs.kv_limit,
                core=inputs.core,
                scale=inputs.scale,
            )
            pairs = ((actual, expected), (inputs.key_cache, keys), (inputs.value_cache, values))
            for one, other in pairs:
                errors[dtype] = max(errors[dtype], max_error(one, other) / case.slack)
    return errors


def _record(bench: Bench, point: Point, config: TileConfig | None = None) -> Record:
    shape, tokens = LLAMA_3_1_8B if bench.on_gpu else SMOLLM2_135M, point.tokens
    dim = 128 if bench.on_gpu else 64
    heads, kv_heads = shape.q // dim, shape.kv // dim
    widths = (shape.q, shape.kv, shape.kv)
    n = sum(widths)
    qkv = widened(bench, tokens, n)
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, POSITIONS, (tokens,), generator=generator).to(bench.device)
    frequencies = 1.0 / 500000.0 ** (torch.arange(0, dim, 2) / dim)
    rotations = rotation_table(frequencies, torch.arange(POSITIONS)).to(bench.device)
    blocks = 4 * tokens
    slots = torch.randperm(blocks * BLOCK_TOKENS, generator=generator)[:tokens].to(bench.device)
    cache = torch.zeros(
        (2, blocks, BLOCK_TOKENS, kv_heads, dim), dtype=bench.dtype, device=bench.device
    )
    made = bench_core(bench, shape, point, widths)
    core = made.epilogue if made else None
    scale = bench_scale(bench, tokens, shape.hidden)
    arguments = (qkv, heads, positions, rotations, slots, cache[0], cache[1])

    def torch_only() -> None:
        q, k, v = torch.split(qkv[:, :n], list(widths), dim=1)
        cos, sin = rotations[positions][:, None].chunk(2, dim=2)

        def rotate(x: torch.Tensor) -> torch.Tensor:
            low, high = x.view(tokens, -1, dim).float().chunk(2, dim=2)
            turned = (low * cos - high * sin, high * cos + low * sin)
            return torch.cat(turned, dim=2).to(qkv.dtype)

        rotate(q)
        cache[0].flatten(0, 1).index_copy_(0, slots, rotate(k))
        cache[1].flatten(0, 1).index_copy_(0, slots, v.view(tokens, -1, dim))

    apart = applied_apart(qkv, made, widths) if made else torch_only

    def three_more_launches() -> None:
        apart()
        rope_kv(*arguments, scale=scale)

    baseline = ("core_apply first", three_more_launches) if made else ("torch", torch_only)
    moved = 2 * tokens * n * qkv.element_size() + tokens * (dim * 4 + 16)
    return bench.record(
        "rope_kv",
        point.case,
        {"tokens": tokens, "n": n, "rank": point.columns, "adapters": point.distinct},
        lambda: rope_kv(*arguments, core=core, scale=scale, config=config),
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


BENCH = OpBench("rope_kv", check, measure, sweep)

if __name__ == "__main__":
    sys.exit(run([BENCH]))
