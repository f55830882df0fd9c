"""Device code of ``rope_kv``. Imported only when a kernel is launched; needs Triton."""
# mypy: disable-error-code="misc, no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from shoal.kernels.core_apply.jit import (
    add_delta,
    load_basis,
    load_h,
    load_matrices,
    load_mixed,
    load_owner,
    mix,
    row_factor,
)


@triton.jit
def load_pair(ptr, low, inside, HALF_DIM: tl.constexpr):
    """Values of a vector at the columns ``low`` and at their partners, as rows of one."""
    a = tl.load(ptr + low, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(ptr + HALF_DIM + low, mask=inside, other=0.0).to(tl.float32)
    return a[None, :], b[None, :]


@triton.jit
def finite(x, limit):
    """NaN becomes 0, and everything else is at most ``limit`` in size."""
    return tl.clamp(tl.where(x == x, x, 0.0), -limit, limit)


@triton.jit
def head_rms(low, high, eps, TILE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
             HEAD_DIM: tl.constexpr):  # fmt: skip
    """1 / root mean square of each head, spread over its columns: ``(TILE, HEADS * HALF)``."""
    squares = tl.reshape(low * low + high * high, (TILE, HEADS, HALF))
    scale = tl.rsqrt(tl.sum(squares, axis=2) / HEAD_DIM + eps)
    spread = tl.broadcast_to(scale[:, :, None], (TILE, HEADS, HALF))
    return tl.reshape(spread, (TILE, HEADS * HALF))


@triton.jit(do_not_specialize=["matrix", "tokens", "sums_stride"])
def rope_kv_kernel(
    qkv_ptr,
    bias_ptr,
    positions_ptr,
    rotations_ptr,
    slots_ptr,
    q_ptr,
    key_cache_ptr,
    value_cache_ptr,
    q_norm_ptr,
    k_norm_ptr,
    arena_ptr,
    addresses_ptr,
    ranks_ptr,
    firsts_ptr,
    mixed_ptr,
    basis_ptr,
    sums_ptr,
    tokens,
    heads,
    kv_heads,
    block_tokens,
    qkv_stride,
    rotations_stride,
    block_stride,
    position_stride,
    head_stride,
    eps,
    limit,
    h_column,
    matrix,
    mixed_stride,
    basis_stride,
    sums_stride,
    parts,
    sums_width,
    sums_eps,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    RANK: tl.constexpr,
    ALIGN: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    FLOAT32_DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program finishes ``HEADS`` heads of q, or of k, or of v, of ``TILE`` tokens.

    Column ``i`` of a head's first half and its partner ``i + HEAD_DIM / 2`` are held apart, as
    ``low`` and ``high``: rotation and norm are then elementwise.

    Everything that no kernel of the step writes is requested before the wait (``launching.py``
    says why that is safe): the longest chain of dependent loads, address to R, runs meanwhile.
    """
    HALF_DIM: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    live = token < tokens
    q_blocks = tl.cdiv(heads, HEADS)
    kv_blocks = tl.cdiv(kv_heads, HEADS)
    block = tl.program_id(1)
    # 0 is q, 1 is k, 2 is v
    section = (block >= q_blocks).to(tl.int32) + (block >= q_blocks + kv_blocks).to(tl.int32)
    before = tl.where(section == 0, 0, q_blocks + (section - 1) * kv_blocks)
    heads_before = tl.where(section == 0, 0, heads + (section - 1) * kv_heads)
    o = tl.arange(0, HEADS * HALF)
    head = (block - before) * HEADS + o // HALF
    i = o % HALF
    inside = (head < tl.where(section == 0, heads, kv_heads)) & (i < HALF_DIM)
    column = (heads_before + head) * HEAD_DIM + i
    mask = live[:, None] & inside[None, :]

    if arena_ptr is not None:
        address, rank, first = load_owner(addresses_ptr, ranks_ptr, firsts_ptr, token, live, ALIGN)
        r = load_matrices(
            arena_ptr, address, rank, first, matrix + section, tl.arange(0, RANK), RANK, ALIGN
        )
    # (The interpreter refuses a vector & a scalar condition as a mask.)
    turning = token < tl.where(section < 2, tokens, 0)
    position = tl.load(positions_ptr + token, mask=turning, other=0)
    caching = token < tl.where(section > 0, tokens, 0)
    slot = tl.load(slots_ptr + token, mask=caching, other=-1)
    if basis_ptr is not None:
        basis_low = load_basis(basis_ptr, column, inside, basis_stride, RANK)
        basis_high = load_basis(basis_ptr, column + HALF_DIM, inside, basis_stride, RANK)
    if bias_ptr is not None:
        bias_low, bias_high = load_pair(bias_ptr, column, inside, HALF_DIM)
    if PDL:
        gdc_wait()
    qkv_ptrs = qkv_ptr + token[:, None] * qkv_stride + column[None, :]
    low = tl.load(qkv_ptrs, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(qkv_ptrs + HALF_DIM, mask=mask, other=0.0).to(tl.float32)
    if arena_ptr is not None:
        h = load_h(qkv_ptr, token, live, qkv_stride, h_column, section, RANK, 3)
        mixed = mix(r, h, address, rank, first, RANK)
    elif mixed_ptr is not None:
        mixed = load_mixed(mixed_ptr, token, live, mixed_stride, section, RANK, 3, SPLITS)
    if sums_ptr is not None:
        factor = row_factor(sums_ptr, token, live, sums_stride, parts, sums_width, sums_eps, PARTS)[
            :, None
        ]
    if basis_ptr is not None:
        low = add_delta(low, mixed, basis_low, FLOAT32_DOT)
        high = add_delta(high, mixed, basis_high, FLOAT32_DOT)
    if sums_ptr is not None:
        low *= factor
        high *= factor
    if bias_ptr is not None:
        low += bias_low
        high += bias_high
    if section > 0:
        low = finite(low, limit)
        high = finite(high, limit)
    if section < 2:
        if q_norm_ptr is not None:
            scale = head_rms(low, high, eps, TILE, HEADS, HALF, HEAD_DIM)
            of_q = i < tl.where(section == 0, HALF_DIM, 0)
            of_k = i < tl.where(section == 1, HALF_DIM, 0)
            q_low, q_high = load_pair(q_norm_ptr, i, of_q, HALF_DIM)
            k_low, k_high = load_pair(k_norm_ptr, i, of_k, HALF_DIM)
            low = low * scale * (q_low + k_low)
            high = high * scale * (q_high + k_high)
        rotation_ptrs = rotations_ptr + position[:, None] * rotations_stride + i[None, :]
        cos = tl.load(rotation_ptrs, mask=mask, other=1.0).to(tl.float32)
        sin = tl.load(rotation_ptrs + HALF_DIM, mask=mask, other=0.0).to(tl.float32)
        turned = low * cos - high * sin
        high = high * cos + low * sin
        low = turned

    if section == 0:
        q_ptrs = q_ptr + token[:, None] * (heads * HEAD_DIM) + column[None, :]
        tl.store(q_ptrs, low.to(q_ptr.dtype.element_ty), mask=mask)
        tl.store(q_ptrs + HALF_DIM, high.to(q_ptr.dtype.element_ty), mask=mask)
    else:
        written = mask & (slot >= 0)[:, None]
        at = (slot // block_tokens) * block_stride + (slot % block_tokens) * position_stride
        cell = at[:, None] + (head.to(tl.int64) * head_stride + i)[None, :]
        first_half = finite(low, limit).to(key_cache_ptr.dtype.element_ty)
        second_half = finite(high, limit).to(key_cache_ptr.dtype.element_ty)
        if section == 1:
            tl.store(key_cache_ptr + cell, first_half, mask=written)
            tl.store(key_cache_ptr + cell + HALF_DIM, second_half, mask=written)
        else:
            tl.store(value_cache_ptr + cell, first_half, mask=written)
            tl.store(value_cache_ptr + cell + HALF_DIM, second_half, mask=written)
