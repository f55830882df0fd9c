"""Benchmark of paged attention: ``python -m shoal.kernels.paged_attention.bench [--check]``.

Bytes are those of the keys and values that rows see, and of q and out, each once. That bounds a
decode; a prefill is bound by arithmetic, and there the baseline says more: torch's own causal
attention over keys and values that lie side by side, unpaged (for prompts its FlashAttention).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from shoal.kernels.benching import Bench, OpBench, Record, run
from shoal.kernels.launching import kernel_runs_on
from shoal.kernels.paged_attention.cases import DECODE_CASES, PREFILL_CASES, make_inputs
from shoal.kernels.paged_attention.kernel import (
    launch_paged_decode,
    launch_paged_prefill,
    paged_decode,
    paged_prefill,
)
from shoal.kernels.paged_attention.launches import DecodeConfig, PrefillConfig
from shoal.kernels.testing import TOLERANCE, max_error

OP = "paged_attention"


class Heads(NamedTuple):
    """Query heads, kv heads, head dimension."""

    q: int
    kv: int
    dim: int


LLAMA_8B = Heads(32, 8, 128)
SMALL = Heads(9, 3, 64)  # SmolLM2-135M
CHECKED = ("around tiles", "split", "window, split, cap", "chunks", "a group of 7", "llama 8b")
DECODE_SWEEP = tuple(
    DecodeConfig(tile, splits, 256, warps, stages)
    for tile, warps in ((32, 2), (32, 4), (64, 4), (128, 4), (128, 8))
    for stages in (3, 4, 5)
    for splits in (1, 2, 4, 16)
)
PREFILL_SWEEP = (
    *(PrefillConfig(128, 64, 8, stages) for stages in (2, 3, 4)),
    *(PrefillConfig(128, 128, 8, stages) for stages in (2, 3)),
    *(PrefillConfig(128, 32, 8, stages) for stages in (3, 4)),
    *(PrefillConfig(64, 64, 4, stages) for stages in (2, 3, 4)),
    PrefillConfig(64, 128, 4, 2),
    PrefillConfig(128, 64, 4, 3),
)


def check(device: torch.device) -> dict[torch.dtype, float]:
    """Largest error over some cases in units of a case's slack, by dtype.

    The tests hold all cases; a GPU takes seconds to compile each variant of the kernels.
    """
    on_kernel = kernel_runs_on(device)
    decode = launch_paged_decode if on_kernel else paged_decode
    prefill = launch_paged_prefill if on_kernel else paged_prefill
    errors = dict.fromkeys(TOLERANCE, 0.0)
    for case in (*DECODE_CASES, *PREFILL_CASES):
        if case.name not in CHECKED or (case.gpu_only and device.type == "cpu"):
            continue
        for dtype in TOLERANCE:
            inputs = make_inputs(case, dtype, device, seed=11)
            scale, window, cap = case.scale, case.window, case.softcap
            host = [tensor.cpu() for tensor in inputs]
            expected = paged_prefill(*host, scale=scale, window=window, softcap=cap)
            if case.decode:
                config = DecodeConfig(32, case.splits, case.min_split)
                got = decode(*inputs[:5], scale=scale, window=window, softcap=cap, config=config)
            else:
                got = prefill(*inputs, scale=scale, window=window, softcap=cap)
            error = max_error(got.cpu(), expected) / case.slack
            errors[dtype] = max(errors[dtype], error)
    return errors


def _cache(bench: Bench, heads: Heads, rows: int, context: int, block_tokens: int) -> list[Tensor]:
    """Keys, values ``(blocks, block_tokens, kv_heads, dim)`` and tables, blocks in random order."""
    per_row = -(-context // block_tokens)
    shape = (rows * per_row, block_tokens, heads.kv, heads.dim)
    keys, values = (torch.empty(shape, device=bench.device, dtype=bench.dtype) for _ in "kv")
    keys.normal_()
    values.normal_()
    order = torch.randperm(rows * per_row, generator=torch.Generator().manual_seed(0))
    return [keys, values, order.view(rows, per_row).to(bench.device)]


def _sdpa(
    bench: Bench, heads: Heads, rows: int, context: int, new: int, q: Tensor
) -> Callable[[], object]:
    """torch's attention of the last ``new`` positions: FlashAttention of all, or of one whatever
    torch picks."""
    shape = (rows, heads.kv, context, heads.dim)
    k, v = (torch.randn(shape, device=bench.device, dtype=bench.dtype) for _ in "kv")
    queries = q.view(rows, new, heads.q, heads.dim).transpose(1, 2)

    def call() -> Tensor:
        return F.scaled_dot_product_attention(queries, k, v, is_causal=new > 1, enable_gqa=True)

    def flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return call()

    return flash if new > 1 and bench.on_gpu else call


def _record(
    bench: Bench,
    heads: Heads,
    rows: int,
    context: int,
    block_tokens: int,
    config: DecodeConfig | PrefillConfig | None = None,
    *,
    prefill: bool = False,
    window: int | None = None,
) -> Record:
    new = context if prefill else 1
    keys, values, tables = _cache(bench, heads, rows, context, block_tokens)
    q = torch.randn((rows * new, heads.q, heads.dim), device=bench.device).to(bench.dtype)
    out = torch.empty_like(q)
    contexts = torch.full((rows,), context, dtype=torch.int32, device=bench.device)
    starts = torch.arange(rows + 1, dtype=torch.int32, device=bench.device) * new
    scale = heads.dim**-0.5

    def call() -> object:
        if prefill:
            assert not isinstance(config, DecodeConfig)
            return paged_prefill(
                q, keys, values, tables, contexts, starts,
                scale=scale, window=window, out=out, config=config,
            )  # fmt: skip
        assert not isinstance(config, PrefillConfig)
        return paged_decode(
            q, keys, values, tables, contexts, scale=scale, window=window, out=out, config=config
        )

    seen = context if window is None or prefill else min(window, context)
    moved = 2 * rows * seen * heads.kv * heads.dim * keys.element_size()
    moved += 2 * q.numel() * q.element_size()
    baseline = None
    if config is None and window is None:
        baseline = ("unpaged SDPA", _sdpa(bench, heads, rows, context, new, q))
    return bench.record(
        OP,
        ("prefill" if prefill else "decode") + ("" if window is None else f" window {window}"),
        {"rows": rows, "context": context, "block": block_tokens},
        call,
        bytes_moved=moved,
        baseline=baseline,
        config=config or "default",
    )


def measure(bench: Bench) -> list[Record]:
    """Decode of full batches and of few long rows, block sizes, a window; prompts."""
    if not bench.on_gpu:
        return [
            _record(bench, SMALL, 8, 128, 16),
            _record(bench, SMALL, 2, 64, 16, prefill=True),
        ]
    points = ((256, 512), (256, 128), (32, 512), (32, 4096), (1, 512), (1, 32768))
    rows = [_record(bench, LLAMA_8B, n, context, 16) for n, context in points]
    rows += [_record(bench, LLAMA_8B, 256, 512, block) for block in (64, 256)]
    rows.append(_record(bench, LLAMA_8B, 32, 4096, 16, window=1024))
    prompts = ((8, 1024), (8, 2048), (1, 2048), (1, 128))
    return rows + [_record(bench, LLAMA_8B, n, c, 16, prefill=True) for n, c in prompts]


def sweep(bench: Bench) -> list[Record]:
    """Every launch variant at the points that decide."""
    decodes = ((256, 512), (32, 4096), (32, 512))
    prompts = ((8, 1024), (1, 2048))
    rows = [
        _record(bench, LLAMA_8B, n, context, 16, config)
        for n, context in decodes
        for config in DECODE_SWEEP
    ]
    return rows + [
        _record(bench, LLAMA_8B, n, context, 16, config, prefill=True)
        for n, context in prompts
        for config in PREFILL_SWEEP
    ]


BENCH = OpBench(OP, check, measure, sweep)

if __name__ == "__main__":
    sys.exit(run([BENCH]))
