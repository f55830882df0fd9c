"""Device code of ``add_rms_norm``. Imported only when a kernel is launched; needs Triton."""
# mypy: disable-error-code="misc, no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from shoal.kernels.core_apply.jit import load_h, load_owner, mix_tile


@triton.jit
def normalise(x, weight_ptr, col, inside, n, eps, PLUS_ONE: tl.constexpr):
    """RMS norm of one row, whose elements beyond n are zero."""
    weight = tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32)
    if PLUS_ONE:
        weight += 1.0
    return x * tl.rsqrt(tl.sum(x * x, axis=0) / n + eps) * weight


@triton.jit(do_not_specialize=["matrix"])
def add_rms_norm_kernel(
    residual_ptr,
    delta_ptr,
    branch_ptr,
    bias_ptr,
    delta_weight_ptr,
    weight_ptr,
    out_ptr,
    arena_ptr,
    addresses_ptr,
    ranks_ptr,
    firsts_ptr,
    basis_ptr,
    tokens,
    n,
    residual_stride,
    delta_stride,
    branch_stride,
    eps,
    h_column,
    columns,
    matrix,
    basis_stride,
    basis_rank_stride,
    PLUS_ONE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """One program finishes ``ROWS`` rows, one after the other, each whole in registers.

    The basis is what costs: every row needs all of it. Its load waits for no address and comes
    first, and one serves all rows of the program.
    """
    begin = tl.program_id(0).to(tl.int64) * ROWS
    col = tl.arange(0, BLOCK)
    inside = col < n
    if basis_ptr is not None:
        row = tl.arange(0, ROWS)
        address, rank, first = load_owner(
            addresses_ptr, ranks_ptr, firsts_ptr, begin + row, begin + row < tokens, ALIGN
        )
        h = load_h(
            delta_ptr, begin + row, begin + row < tokens, delta_stride, h_column, columns, RANK
        )
        i = tl.arange(0, RANK)
        basis_ptrs = (
            basis_ptr + col[None, :].to(tl.int64) * basis_stride + i[:, None] * basis_rank_stride
        )
        basis = tl.load(basis_ptrs, mask=inside[None, :] & (i < columns)[:, None], other=0.0)
        mixed = mix_tile(h, arena_ptr, address, rank, first, matrix, RANK, ALIGN)
    for at in tl.static_range(ROWS):
        token = begin + at
        # (The interpreter refuses a vector & a scalar condition as a mask.)
        mask = col < tl.where(token < tokens, n, 0)
        x = tl.load(residual_ptr + token * residual_stride + col, mask=mask, other=0.0)
        x = x.to(tl.float32)
        if delta_ptr is not None:
            delta = tl.load(delta_ptr + token * delta_stride + col, mask=mask, other=0.0)
            delta = delta.to(tl.float32)
            if branch_ptr is not None:
                branch = tl.load(branch_ptr + token * branch_stride + col, mask=mask, other=0.0)
                delta += branch.to(tl.float32)
            if bias_ptr is not None:
                delta += tl.load(bias_ptr + col, mask=inside, other=0.0).to(tl.float32)
            if basis_ptr is not None:
                mine = tl.sum(tl.where((row == at)[:, None], mixed, 0.0), axis=0)
                delta += tl.sum(mine[:, None] * basis.to(tl.float32), axis=0)
            if delta_weight_ptr is not None:
                delta = normalise(delta, delta_weight_ptr, col, inside, n, eps, PLUS_ONE)
            # The norm is that of the residual as it is stored.
            rounded = (x + delta).to(residual_ptr.dtype.element_ty)
            tl.store(residual_ptr + token * residual_stride + col, rounded, mask=mask)
            x = rounded.to(tl.float32)
        result = normalise(x, weight_ptr, col, inside, n, eps, PLUS_ONE)
        tl.store(out_ptr + token * n + col, result.to(out_ptr.dtype.element_ty), mask=mask)
