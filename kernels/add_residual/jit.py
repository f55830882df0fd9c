"""Device code of ``add_residual``. Imported only when a kernel is launched; needs Triton."""
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
)


@triton.jit(do_not_specialize=["matrix", "tokens"])
def add_residual_kernel(
    residual_ptr,
    delta_ptr,
    bias_ptr,
    weight_ptr,
    out_ptr,
    sums_ptr,
    arena_ptr,
    addresses_ptr,
    ranks_ptr,
    firsts_ptr,
    mixed_ptr,
    basis_ptr,
    tokens,
    n,
    residual_stride,
    delta_stride,
    h_column,
    matrix,
    mixed_stride,
    basis_stride,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANK: tl.constexpr,
    ALIGN: tl.constexpr,
    SPLITS: tl.constexpr,
    FLOAT32_DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program finishes a ``(TILE tokens, BLOCK_N columns)`` tile, and its part of the sums.

    Everything that no kernel of the step writes is requested before the wait (``launching.py``
    says why that is safe): the longest chain of dependent loads, address to R, runs meanwhile.
    """
    token = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    live = token < tokens
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = col < n
    mask = live[:, None] & inside[None, :]
    if arena_ptr is not None:
        address, rank, first = load_owner(addresses_ptr, ranks_ptr, firsts_ptr, token, live, ALIGN)
        i = tl.arange(0, RANK)
        r = load_matrices(arena_ptr, address, rank, first, matrix, i, RANK, ALIGN)
    if basis_ptr is not None:
        basis = load_basis(basis_ptr, col, inside, basis_stride, RANK)
    weight = tl.load(weight_ptr + col, mask=inside, other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + col, mask=inside, other=0.0)
    if PDL:
        gdc_wait()
    residual_ptrs = residual_ptr + token[:, None] * residual_stride + col[None, :]
    x = tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    if delta_ptr is not None:
        delta_ptrs = delta_ptr + token[:, None] * delta_stride + col[None, :]
        x += tl.load(delta_ptrs, mask=mask, other=0.0).to(tl.float32)
        if arena_ptr is not None:
            h = load_h(delta_ptr, token, live, delta_stride, h_column, 0, RANK, 1)
            x = add_delta(x, mix(r, h, address, rank, first, RANK), basis, FLOAT32_DOT)
        elif mixed_ptr is not None:
            mixed = load_mixed(mixed_ptr, token, live, mixed_stride, 0, RANK, 1, SPLITS)
            x = add_delta(x, mixed, basis, FLOAT32_DOT)
        if bias_ptr is not None:
            x += bias.to(tl.float32)[None, :]
        rounded = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptrs, rounded, mask=mask)
        x = rounded.to(tl.float32)
    result = x * weight.to(tl.float32)[None, :]
    out_ptrs = out_ptr + token[:, None] * n + col[None, :]
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=mask)
    sums_ptrs = sums_ptr + tl.program_id(1).to(tl.int64) * tokens + token
    tl.store(sums_ptrs, tl.sum(x * x, axis=1), mask=live)
