"""Inputs of ``rope_kv`` for its tests and its benchmark."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.kernels.core_apply.epilogue import Epilogue, RowScale
from shoal.kernels.core_apply.epilogue_cases import (
    ALIGNED,
    BARE,
    LARGEST,
    MADE,
    MIXED_RANKS,
    SMALL,
    CoreCase,
    make_scale,
    widen,
)
from shoal.kernels.rope_kv.reference import rotation_table
from shoal.kernels.testing import poisoned_rows, random


@dataclass(frozen=True, slots=True)
class Case:
    """One shape of input; rows are views with NaN around them.

    Attributes:
        padding: how many of the last tokens are not written to the cache.
        joint: the caches are views into one tensor, with gaps between the blocks.
        broken: some inputs are NaN or infinite.
    """

    name: str
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    block_tokens: int = 4
    norm: bool = False
    bias: bool = False
    padding: int = 0
    joint: bool = False
    broken: bool = False
    core: CoreCase | None = None
    parts: int = 0
    gpu_only: bool = False

    @property
    def slack(self) -> float:
        """Multiplies the tolerance: 10⁷ outputs have rarer extremes."""
        return 3.0 if self.gpu_only else 1.0


CASES = (
    Case("empty", tokens=0, heads=2, kv_heads=1, head_dim=8),
    Case("one row", tokens=1, heads=2, kv_heads=1, head_dim=16),
    Case("divides nothing", 5, 9, 3, 24, block_tokens=3, bias=True, joint=True, parts=1),
    Case("head norms", tokens=3, heads=3, kv_heads=1, head_dim=20, norm=True, bias=True),
    Case("padding", tokens=7, heads=2, kv_heads=2, head_dim=8, padding=3),
    Case("broken values", tokens=6, heads=2, kv_heads=2, head_dim=8, broken=True),
    Case("one row, core", 1, 4, 2, 16, core=SMALL, parts=16),
    Case("all bare, core", 2, 2, 1, 8, core=BARE),
    Case(
        "mixed ranks, core", 21, 5, 3, 20, 3, norm=True, bias=True, padding=2, core=MIXED_RANKS,
        parts=3,
    ),
    Case("shared columns, core", 18, 9, 3, 64, joint=True, core=ALIGNED),
    Case("already mixed, core", 19, 5, 3, 20, bias=True, core=MADE, parts=5),
    Case("largest", 4096, 32, 8, 128, block_tokens=16, gpu_only=True, core=LARGEST, parts=16),
    Case("largest, already mixed", 999, 32, 8, 128, gpu_only=True, core=replace(LARGEST, splits=2)),
)  # fmt: skip


class Inputs(NamedTuple):
    """Arguments of ``rope_kv``, in the reference's order."""

    qkv: Tensor
    heads: int
    positions: Tensor
    rotations: Tensor
    slot_mapping: Tensor
    key_cache: Tensor
    value_cache: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    bias: Tensor | None
    kv_limit: float
    core: Epilogue | None
    scale: RowScale | None


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Random inputs of magnitude about one; see ``epilogue_cases.widen`` for the poison.

    The caches start as zeros: what must not be written is then seen.
    """
    generator = torch.Generator().manual_seed(seed)
    dim = case.head_dim
    widths = (case.heads * dim, case.kv_heads * dim, case.kv_heads * dim)
    y0 = random((case.tokens, sum(widths)), generator, dtype)
    if case.broken:
        first, second = (case.heads * dim, (case.heads + case.kv_heads) * dim)
        y0[0, first], y0[1, first] = float("nan"), float("inf")
        y0[2, second], y0[3, second] = float("-inf"), float("nan")
        y0[4, first] = torch.finfo(dtype).max
    qkv, core = widen(y0.to(device), case.core, widths, generator)

    blocks = -(-case.tokens // case.block_tokens) + 2
    shape = (blocks, case.block_tokens, case.kv_heads, dim)
    caches = torch.zeros((blocks, 2, *shape[1:]), dtype=dtype, device=device).unbind(1)
    if not case.joint:
        caches = tuple(cache.contiguous() for cache in caches)
    order = torch.randperm(blocks * case.block_tokens, generator=generator)
    slots = order[: case.tokens]
    slots[case.tokens - case.padding :] = -1
    positions = torch.randint(0, 50, (case.tokens,), generator=generator)
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, dim, 2) / dim)
    rotations = rotation_table(frequencies, torch.arange(50), factor=1.1).to(device)

    def norm_weight() -> Tensor | None:
        weight = random((dim,), generator, torch.float32, 0.1).to(device) + 1.0
        return weight if case.norm else None

    return Inputs(
        qkv,
        case.heads,
        positions.to(device),
        poisoned_rows(rotations),
        slots.to(device),
        caches[0],
        caches[1],
        norm_weight(),
        norm_weight(),
        1e-6,
        random((sum(widths),), generator, dtype).to(device) if case.bias else None,
        1e15,
        core,
        make_scale(case.parts, case.tokens, device, generator),
    )
