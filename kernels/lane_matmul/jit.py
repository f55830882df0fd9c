"""Device code of ``lane_matmul``. Imported only when a kernel is launched; needs Triton."""
# mypy: disable-error-code="misc, no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def lane_matmul_kernel(
    x_ptr,
    bank_ptr,
    owners_ptr,
    out_ptr,
    length,
    k,
    n,
    scale,
    x_row_stride,
    x_stride,
    x_module_stride,
    lane_stride,
    module_stride,
    k_stride,
    n_stride,
    out_row_stride,
    out_stride,
    out_module_stride,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program ``(tile, c, m)``: ``BLOCK_N`` outputs of module m for ``TILE`` tokens of one row.

    A row has one lane, so all tokens of a program share one matrix. Everything is converted to
    float32 on loading: the matrix is float32 anyway, and PRECISION says how it is multiplied.
    """
    tiles = tl.cdiv(length, TILE)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.load(owners_ptr + row).to(tl.int64)
    live = token < length
    inside = column < n
    module = tl.program_id(2).to(tl.int64)
    out_row = out_ptr + row * out_row_stride + module * out_module_stride
    out_ptrs = out_row + token[:, None] * out_stride + column[None, :]
    out_mask = live[:, None] & inside[None, :]
    acc = tl.zeros((TILE, BLOCK_N), dtype=tl.float32)
    if lane >= 0:
        x_row = x_ptr + row * x_row_stride + module * x_module_stride
        matrix = bank_ptr + lane * lane_stride + module * module_stride
        for first in range(0, k, BLOCK_K):
            i = first + tl.arange(0, BLOCK_K)
            x = tl.load(
                x_row + token[:, None] * x_stride + i[None, :],
                mask=live[:, None] & (i < k)[None, :],
                other=0.0,
            )
            m = tl.load(
                matrix + i[:, None] * k_stride + column[None, :] * n_stride,
                mask=(i < k)[:, None] & inside[None, :],
                other=0.0,
            )
            acc = tl.dot(x.to(tl.float32), m.to(tl.float32), acc, input_precision=PRECISION)
        acc *= scale
        if ADD:
            acc += tl.load(out_ptrs, mask=out_mask, other=0.0).to(tl.float32)
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=out_mask)
    elif not ADD:
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=out_mask)
