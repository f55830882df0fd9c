"""Device code of ``core_project`` and ``core_mix``; imported when launched, needs Triton."""
# mypy: disable-error-code="misc, no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from shoal.kernels.core_apply.jit import load_h, load_matrices, load_owner, mix


@triton.jit(do_not_specialize=["matrix", "tokens"])
def core_project_kernel(
    x_ptr,
    projection_ptr,
    mixed_ptr,
    arena_ptr,
    addresses_ptr,
    ranks_ptr,
    firsts_ptr,
    tokens,
    k,
    x_stride,
    projection_stride,
    matrix,
    MODULES: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    ALIGN: tl.constexpr,
    FLOAT32_DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program ``(t, s)`` projects split s of ``TILE`` tokens for every module, and mixes that.

    It runs beside a GEMM that wants the whole device, so what counts is how few programs there are,
    while they end before the GEMM does. ``ROWS`` of R are mixed at a time.
    """
    token = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    live = token < tokens
    address, rank, first = load_owner(addresses_ptr, ranks_ptr, firsts_ptr, token, live, ALIGN)
    c = tl.arange(0, WIDTH)  # modules side by side, RANK columns each
    module = c // RANK
    j = c % RANK
    row = (j // 16 * (MODULES * 16) + module * 16 + j % 16).to(tl.int64)
    if PDL:
        gdc_wait()
    h = tl.zeros((TILE, WIDTH), tl.float32)
    for step in range(STEPS):
        col = (tl.program_id(1) * STEPS + step) * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + token[:, None] * x_stride + col[None, :],
            mask=live[:, None] & (col < k)[None, :],
            other=0.0,
        )
        a = tl.load(
            projection_ptr + row[None, :] * projection_stride + col[:, None],
            mask=(module < MODULES)[None, :] & (col < k)[:, None],
            other=0.0,
        )
        if FLOAT32_DOT:
            x = x.to(tl.float32)
            a = a.to(tl.float32)
        h = tl.dot(x.to(a.dtype), a, h, input_precision="ieee")
    modules = tl.reshape(h, (TILE, WIDTH // RANK, RANK))
    at = (tl.program_id(1).to(tl.int64) * tokens + token) * (MODULES * RANK)
    for m in tl.static_range(MODULES):
        own = tl.arange(0, WIDTH // RANK)[None, :, None] == m
        mine = tl.sum(tl.where(own, modules, 0.0), axis=1)
        for begin in tl.static_range(0, RANK, ROWS):
            i = begin + tl.arange(0, ROWS)
            r = load_matrices(arena_ptr, address, rank, first, matrix + m, i, RANK, ALIGN)
            mixed = mix(r, mine, address, rank, first, RANK)
            ptrs = mixed_ptr + at[:, None] + (m * RANK + i)[None, :]
            tl.store(ptrs, mixed, mask=live[:, None])


@triton.jit(do_not_specialize=["matrix", "tokens"])
def core_mix_rows_kernel(
    y_ptr,
    mixed_ptr,
    arena_ptr,
    addresses_ptr,
    ranks_ptr,
    firsts_ptr,
    tokens,
    y_stride,
    h_column,
    matrix,
    MODULES: tl.constexpr,
    TILE: tl.constexpr,
    RANK: tl.constexpr,
    ALIGN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program ``(t, c, m)`` makes 16 columns of ``h Rᵀ`` of module m for ``TILE`` tokens."""
    module = tl.program_id(2)
    token = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    live = token < tokens
    i = tl.program_id(1) * 16 + tl.arange(0, 16)
    address, rank, first = load_owner(addresses_ptr, ranks_ptr, firsts_ptr, token, live, ALIGN)
    r = load_matrices(arena_ptr, address, rank, first, matrix + module, i, RANK, ALIGN)
    if PDL:
        gdc_wait()
    h = load_h(y_ptr, token, live, y_stride, h_column, module, RANK, MODULES)
    mixed = mix(r, h, address, rank, first, RANK)
    at = (token * MODULES + module) * RANK
    tl.store(mixed_ptr + at[:, None] + i[None, :], mixed, mask=live[:, None])
