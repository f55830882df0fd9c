"""Inputs of paged attention for its tests and its benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.kernels.testing import random


@dataclass(frozen=True, slots=True)
class Case:
    """One shape of input.

    Attributes:
        rows: ``(context, new tokens)`` of each row; new is 1 everywhere in a decode.
        strided: q is a slice of a wider (q, k, v) tensor full of NaN.
        wide_table: further table entries, pointing to a block of NaN.
        splits: programs that share a decode row.
        min_split: keys one of them takes at least.
    """

    name: str
    rows: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    block_tokens: int = 16
    scale: float = 0.3
    window: int | None = None
    softcap: float | None = None
    strided: bool = True
    wide_table: int = 0
    splits: int = 1
    min_split: int = 16
    gpu_only: bool = False

    @property
    def decode(self) -> bool:
        """Whether every row has one new token."""
        return all(new == 1 for _, new in self.rows)

    @property
    def slack(self) -> float:
        """Multiplies the tolerance: 10⁸ outputs have rarer extremes."""
        return 3.0 if self.gpu_only else 1.0


def _ones(*contexts: int) -> tuple[tuple[int, int], ...]:
    return tuple((context, 1) for context in contexts)


EDGES = _ones(1, 15, 16, 17, 34)
CHUNKS = ((1, 1), (9, 9), (40, 13), (33, 1), (32, 20))
DECODE_CASES = (
    Case("no rows", rows=()),
    Case("one position", rows=_ones(1), strided=False),
    Case("around tiles", rows=EDGES, wide_table=2),
    Case("padding rows", rows=_ones(5, 0, 20, 0)),
    Case("one kv head per head", rows=_ones(20, 3), heads=3, kv_heads=3),
    Case("a group of 7", rows=_ones(37, 18), heads=7, kv_heads=1, head_dim=8),
    Case("a group of 20", rows=_ones(21), heads=20, kv_heads=1),
    Case("head 64, block 32", rows=_ones(40, 9), head_dim=64, block_tokens=32),
    Case("head 96", rows=_ones(35), head_dim=96, scale=0.1),
    Case(
        "head 128, block 256", rows=_ones(260, 1), kv_heads=1, head_dim=128,
        block_tokens=256, scale=0.1,
    ),
    Case("head 256, block 64", rows=_ones(40), head_dim=256, block_tokens=64, scale=0.06),
    Case("blocks of 4", rows=EDGES, block_tokens=4),
    Case("split", rows=_ones(16, 17, 70, 0), kv_heads=1, splits=4),
    Case(
        "split, longer parts", rows=_ones(33, 130), kv_heads=1, splits=3, min_split=48, head_dim=24,
    ),
    Case("window", rows=EDGES, window=20),
    Case("window of one", rows=_ones(1, 18), window=1, splits=2),
    Case("window, split, cap", rows=_ones(10, 95), kv_heads=1, window=70, softcap=1.5, splits=3),
    Case("softcap", rows=_ones(7, 40), softcap=2.0, block_tokens=4),
    Case(
        "llama 8b", rows=_ones(512, 1, 500, 4096, 513), heads=32, kv_heads=8, head_dim=128,
        scale=0.09, splits=4, min_split=256, gpu_only=True,
    ),
)  # fmt: skip
PREFILL_CASES = (
    Case("no rows", rows=()),
    Case("one token", rows=((1, 1),), strided=False),
    Case("chunks", rows=CHUNKS, wide_table=1),
    Case("rows without tokens", rows=((0, 0), (20, 5), (30, 0), (8, 8), (0, 0))),
    Case("a group of 7", rows=((40, 11), (3, 3)), heads=7, kv_heads=1),
    Case("one kv head per head", rows=((21, 14),), heads=3, kv_heads=3, block_tokens=32),
    Case("head 96", rows=((35, 19),), head_dim=96, scale=0.1),
    Case(
        "head 128, block 256", rows=((262, 20),), kv_heads=1, head_dim=128,
        block_tokens=256, scale=0.1,
    ),
    Case("head 256", rows=((33, 18),), head_dim=256, scale=0.06),
    Case("blocks of 4", rows=CHUNKS[2:], kv_heads=1, block_tokens=4, head_dim=8),
    Case("window", rows=CHUNKS, kv_heads=1, window=20),
    Case(
        "window, cap, blocks of 4", rows=CHUNKS, kv_heads=1, window=5, softcap=1.5, block_tokens=4,
    ),
    Case("softcap", rows=CHUNKS[2:], softcap=2.0),
    Case(
        "llama 8b", rows=((1024, 1024), (4096, 700), (513, 1), (300, 200)), heads=32, kv_heads=8,
        head_dim=128, scale=0.09, gpu_only=True,
    ),
)  # fmt: skip


class Inputs(NamedTuple):
    """Arguments of ``paged_prefill``; a decode takes all but ``query_starts``."""

    q: Tensor
    keys: Tensor
    values: Tensor
    block_tables: Tensor
    context_lens: Tensor
    query_starts: Tensor


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Random inputs whose blocks lie in shuffled order.

    NaN fills every position that no query may see: unused blocks, the rest of a row's last block,
    and what lies before the first query's window.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-context // case.block_tokens) for context, _ in case.rows]
    total = sum(counts)
    order = torch.randperm(total, generator=generator).tolist()
    shape = (total + 1, case.block_tokens, case.kv_heads, case.head_dim)
    keys, values = torch.full(shape, float("nan")), torch.full(shape, float("nan"))
    widest = max(counts, default=0) + case.wide_table
    tables = torch.full((len(case.rows), widest), total, dtype=torch.int64)
    for row, (context, new) in enumerate(case.rows):
        blocks = [order.pop() for _ in range(counts[row])]
        tables[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int64)
        first = max(0, context - new - case.window + 1) if case.window else 0
        for position in range(first, context):
            block, offset = divmod(position, case.block_tokens)
            for cache in (keys, values):
                cache[blocks[block], offset] = torch.randn(shape[2:], generator=generator)
    # Padded blocks are never read: those wholly before a window may be anything.
    if case.window:
        for row, (context, new) in enumerate(case.rows):
            tables[row, : max(0, context - new - case.window + 1) // case.block_tokens] = total
    starts = [0]
    for _, new in case.rows:
        starts.append(starts[-1] + new)
    q = random((starts[-1], case.heads, case.head_dim), generator, dtype).to(device)
    if case.strided:
        wide = q.new_full((starts[-1] + 1, case.heads + 2, case.head_dim + 8), float("nan"))
        view = wide[1:, 1:-1, : case.head_dim]
        view.copy_(q)
        q = view
    return Inputs(
        q,
        keys.to(dtype).to(device),
        values.to(dtype).to(device),
        tables.to(device),
        torch.tensor([context for context, _ in case.rows], dtype=torch.int32, device=device),
        torch.tensor(starts, dtype=torch.int32, device=device),
    )
