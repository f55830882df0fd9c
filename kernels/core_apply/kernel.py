"""``core_apply``: the LoRA-XS delta of every token, each with its own adapter, in one launch.

Owns argument checks, dispatch and launch shapes. Dispatch goes by device alone: CPU tensors run
the reference, GPU tensors the Triton kernels. ``launch_core_apply`` always launches; on CPU
tensors that needs Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shoal.kernels.core_apply.reference import core_apply_reference
from shoal.kernels.errors import ShapeError, check_devices, check_matrix, check_vector
from shoal.kernels.launching import (
    ALIGNMENTS,
    FLOATS,
    dot_in_float32,
    power_of_two,
    require_triton,
)

MAX_RANK = 1024
# Of ``fused``: beyond it R takes all registers, and the compiler minutes.
FUSED_RANK_MAX = 64


@dataclass(frozen=True, slots=True)
class CoreConfig:
    """How to launch. ``fused``, for ranks up to ``FUSED_RANK_MAX``, re-reads R for every
    ``block_n`` outputs but is one launch; ``two_step`` writes ``u = h Rᵀ`` once and adds
    ``u Bᵀ`` with a GEMM.
    """

    method: Literal["fused", "two_step"] = "fused"
    block_n: int = 256
    tile: int = 16
    num_warps: int = 4


def core_apply(
    y: Tensor,
    h: Tensor,
    arena: Tensor,
    addresses: Tensor,
    ranks: Tensor,
    basis: Tensor,
    *,
    max_rank: int | None = None,
    alignment: int = 1,
    config: CoreConfig | None = None,
) -> None:
    """Add each token's LoRA-XS delta: ``y[t] += (h[t, :r] @ R_tᵀ) @ basis[:, :r]ᵀ``.

    ``R_t`` is the row-major ``(r, r)`` matrix that starts at element ``addresses[t]`` of the
    arena, with ``r = ranks[t]``. Ranks may differ from token to token.

    Args:
        y: ``(tokens, n)``, in and out; the base output. Rows may be strided.
        h: ``(tokens, columns)``, ``h = y0 @ basis``. Columns from ``r`` on are not used.
        arena: ``(elements,)``, all adapters; the scale is folded into R. Read only.
        addresses: ``(tokens,)`` int64; -1 means no adapter: the token's y stays as it is.
        ranks: ``(tokens,)`` int32, ``1 … max_rank``; ignored where the address is -1.
        basis: ``(n, columns)``, the shared basis. Rows may be strided.
        max_rank: an upper bound on ``ranks``, at most 1024; default ``columns``. Rows of R beyond
            it would be left out: the GPU cannot check it without a synchronisation.
        alignment: a number that divides every used address and rank (1, 2, 4, 8 or 16). From 8
            on, R is loaded 16 bytes at a time. A promise, not checked.
        config: launch parameters, for measurements; default by the sweep in ``bench.py``.

    y, h, arena and basis are float32, float16 or bfloat16, each its own; sums are float32.

    Raises:
        ShapeError: a shape, dtype, stride or device is wrong (names the argument).
        TritonMissing: the tensors are on a GPU and Triton is not installed.

    Cost: reads ``tokens·(2·r + n) + Σ_distinct r² + n·r`` elements and writes ``tokens·n``;
    memory bound, and at few tokens bound by latency.
    """
    width = _check(y, h, arena, addresses, ranks, basis, max_rank, alignment)
    if y.device.type == "cpu":
        core_apply_reference(y, h, arena, addresses, ranks, basis)
    else:
        _launch(y, h, arena, addresses, ranks, basis, width, alignment, config)


def launch_core_apply(
    y: Tensor,
    h: Tensor,
    arena: Tensor,
    addresses: Tensor,
    ranks: Tensor,
    basis: Tensor,
    *,
    max_rank: int | None = None,
    alignment: int = 1,
    config: CoreConfig | None = None,
) -> None:
    """``core_apply`` through Triton on any device; CPU tensors need ``TRITON_INTERPRET=1``."""
    width = _check(y, h, arena, addresses, ranks, basis, max_rank, alignment)
    _launch(y, h, arena, addresses, ranks, basis, width, alignment, config)


def default_config(tokens: int, max_rank: int) -> CoreConfig:
    """The launch parameters for a batch of ``tokens`` and ranks up to ``max_rank``."""
    # Sweep on an H100, 2026-11 (results/h100-kernels.jsonl). Rank 16: fused with 256 outputs per
    # program is the fastest or within 5 % of it at 1 to 2048 tokens (256 tokens of 4096: 8.4 µs,
    # two_step 10.6; 2048 tokens: 19.8, two_step 24.9). Rank 64: fused reads R again for every
    # block and its R does not fit the registers (256 tokens: 13.4 µs at best, two_step 11.9;
    # 2048 tokens of 14336: 152 and 72); two_step wins from one token on (12.6 and 10.4), with one
    # token per program up to 512 tokens and 4 beyond (2048 of 4096: 26.6, with one 29.0).
    # Rank 32: fused; 256 outputs for a few tokens (1 token: 6.8 µs, with 512 7.7), then 512
    # (256 tokens: 9.0, with 256 10.0; 2048 tokens of 14336: 72.6, two_step 70.5).
    if max_rank > FUSED_RANK_MAX:  # not measured: 16 rows of R have to fit the registers
        return CoreConfig("two_step", tile=1, num_warps=4 if max_rank <= 256 else 8)
    if max_rank > 32:
        few = tokens <= 512
        return CoreConfig("two_step", tile=1 if few else 4, num_warps=1 if few else 4)
    if max_rank > 16:
        return CoreConfig(block_n=256 if tokens <= 16 else 512, num_warps=8)
    return CoreConfig()


def _check(
    y: Tensor,
    h: Tensor,
    arena: Tensor,
    addresses: Tensor,
    ranks: Tensor,
    basis: Tensor,
    max_rank: int | None,
    alignment: int,
) -> int:
    """Check everything the host can see; returns the bound on the ranks."""
    check_matrix("y", y, FLOATS)
    check_matrix("h", h, FLOATS)
    check_matrix("basis", basis, FLOATS)
    tokens, n = y.shape
    columns = basis.shape[1]
    if h.shape != (tokens, columns):
        raise ShapeError("h", f"shape {(tokens, columns)}", tuple(h.shape))
    if basis.shape[0] != n:
        raise ShapeError("basis", f"shape ({n}, {columns})", tuple(basis.shape))
    check_vector("arena", arena, FLOATS, None)
    check_vector("addresses", addresses, (torch.int64,), tokens)
    check_vector("ranks", ranks, (torch.int32,), tokens)
    check_devices(
        {"y": y, "h": h, "arena": arena, "addresses": addresses, "ranks": ranks, "basis": basis}
    )
    width = columns if max_rank is None else max_rank
    if not 1 <= width <= min(columns, MAX_RANK):
        raise ShapeError("max_rank", f"1 to min(columns {columns}, {MAX_RANK})", width)
    if alignment not in ALIGNMENTS:
        raise ShapeError("alignment", f"one of {ALIGNMENTS}", alignment)
    return width


def _launch(
    y: Tensor,
    h: Tensor,
    arena: Tensor,
    addresses: Tensor,
    ranks: Tensor,
    basis: Tensor,
    width: int,
    alignment: int,
    config: CoreConfig | None,
) -> None:
    require_triton()
    from shoal.kernels.core_apply.jit import core_apply_kernel, core_mix_kernel

    tokens, n = y.shape
    if tokens == 0 or n == 0:
        return
    chosen = config or default_config(tokens, width)
    if chosen.method == "fused" and width > FUSED_RANK_MAX:
        raise ShapeError("max_rank", f"at most {FUSED_RANK_MAX} with method fused", width)
    rank = power_of_two(width, least=16)
    chunk = 16  # the smallest inner size of tl.dot; larger chunks only cost registers
    token_tiles = -(-tokens // chosen.tile)
    if chosen.method == "two_step":
        mixed = torch.empty((tokens, width), dtype=basis.dtype, device=y.device)
        core_mix_kernel[(token_tiles, -(-width // chunk))](
            mixed,
            h,
            arena,
            addresses,
            ranks,
            tokens,
            width,
            mixed.stride(0),
            h.stride(0),
            RANK=rank,
            TILE=chosen.tile,
            CHUNK=chunk,
            ALIGN=alignment,
            num_warps=chosen.num_warps,
        )
        if y.dtype == basis.dtype:
            y.addmm_(mixed, basis[:, :width].t())
        else:
            y += mixed @ basis[:, :width].t()
        return
    core_apply_kernel[(token_tiles, -(-n // chosen.block_n))](
        y,
        h,
        arena,
        addresses,
        ranks,
        basis,
        tokens,
        n,
        basis.shape[1],
        y.stride(0),
        h.stride(0),
        basis.stride(0),
        RANK=rank,
        TILE=chosen.tile,
        BLOCK_N=chosen.block_n,
        CHUNK=chunk,
        ALIGN=alignment,
        FLOAT32_DOT=dot_in_float32(basis.dtype),
        num_warps=chosen.num_warps,
    )
