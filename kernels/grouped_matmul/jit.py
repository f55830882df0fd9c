"""Device code of ``grouped_matmul``. Imported only when a kernel is launched; needs Triton."""
# mypy: disable-error-code="misc, no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def _one_token(
    x_row,
    matrix,
    out_row,
    k,
    n,
    row_stride,
    column,
    TRANSPOSED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Matrix-vector product on the plain arithmetic units; products are summed once, at the end."""
    inside = column < n
    base = tl.load(out_row + column, mask=inside, other=0.0).to(tl.float32)
    if TRANSPOSED:
        acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        for first in tl.range(0, k, BLOCK_K, num_stages=STAGES):
            i = first + tl.arange(0, BLOCK_K)
            x = tl.load(x_row + i, mask=i < k, other=0.0).to(tl.float32)
            m = tl.load(
                matrix + column[:, None] * row_stride + i[None, :],
                mask=inside[:, None] & (i < k)[None, :],
                other=0.0,
            )
            acc += m.to(tl.float32) * x[None, :]
        product = tl.sum(acc, axis=1)
    else:
        acc = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
        for first in tl.range(0, k, BLOCK_K, num_stages=STAGES):
            i = first + tl.arange(0, BLOCK_K)
            x = tl.load(x_row + i, mask=i < k, other=0.0).to(tl.float32)
            m = tl.load(
                matrix + i.to(tl.int64)[:, None] * row_stride + column[None, :],
                mask=(i < k)[:, None] & inside[None, :],
                other=0.0,
            )
            acc += m.to(tl.float32) * x[:, None]
        product = tl.sum(acc, axis=0)
    tl.store(out_row + column, (base + product).to(out_row.dtype.element_ty), mask=inside)


@triton.jit
def _many_tokens(
    x_row,
    matrix,
    out_row,
    length,
    k,
    n,
    row_stride,
    x_stride,
    out_stride,
    column,
    TRANSPOSED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FLOAT32_DOT: tl.constexpr,
):
    """Matrix product on the matrix units: the tile's tokens share each load of the matrix."""
    offset = tl.arange(0, TILE).to(tl.int64)
    live = offset < length
    inside = column < n
    out_ptrs = out_row + offset[:, None] * out_stride + column[None, :]
    out_mask = live[:, None] & inside[None, :]
    acc = tl.load(out_ptrs, mask=out_mask, other=0.0).to(tl.float32)
    for first in range(0, k, BLOCK_K):
        i = first + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_row + offset[:, None] * x_stride + i[None, :],
            mask=live[:, None] & (i < k)[None, :],
            other=0.0,
        )
        if TRANSPOSED:
            places = column[None, :] * row_stride + i[:, None]
        else:
            places = i.to(tl.int64)[:, None] * row_stride + column[None, :]
        m = tl.load(matrix + places, mask=(i < k)[:, None] & inside[None, :], other=0.0)
        if FLOAT32_DOT:
            m = m.to(tl.float32)
        acc = tl.dot(x.to(m.dtype), m, acc, input_precision="ieee")
    tl.store(out_ptrs, acc.to(out_row.dtype.element_ty), mask=out_mask)


@triton.jit
def grouped_matmul_kernel(
    x_ptr,
    arena_ptr,
    addresses_ptr,
    ranks_ptr,
    starts_ptr,
    lengths_ptr,
    out_ptr,
    k,
    n,
    row_stride,
    x_stride,
    out_stride,
    TRANSPOSED: tl.constexpr,
    HAS_RANKS: tl.constexpr,
    HAS_TILES: tl.constexpr,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
    SINGLE_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
    FLOAT32_DOT: tl.constexpr,
):
    """Program ``(tile, c)`` computes outputs ``c·BLOCK_N …`` of one tile.

    The tile is the fastest program axis: tiles of one adapter run side by side and find its
    matrix in the cache. SINGLE_K > 0 sends tiles of one token to the plain arithmetic units.
    """
    tile = tl.program_id(0).to(tl.int64)
    if HAS_TILES:
        start = tl.load(starts_ptr + tile).to(tl.int64)
        length = tl.load(lengths_ptr + tile)
    else:
        start = tile
        length = 1
    if length > 0:
        address = tl.load(addresses_ptr + start)
        used_k = k
        used_n = n
        if HAS_RANKS:
            rank = tl.load(ranks_ptr + start)
            if TRANSPOSED:
                used_n = tl.minimum(n, rank)
            else:
                used_k = tl.minimum(k, rank)
        first_column = tl.program_id(1).to(tl.int64) * BLOCK_N
        if (address >= 0) & (first_column < used_n):
            matrix = arena_ptr + tl.multiple_of(address, ALIGN)
            column = first_column + tl.arange(0, BLOCK_N)
            x_row = x_ptr + start * x_stride
            out_row = out_ptr + start * out_stride
            together = length > 0
            if SINGLE_K > 0:
                together = length > 1
                if length == 1:
                    _one_token(
                        x_row,
                        matrix,
                        out_row,
                        used_k,
                        used_n,
                        row_stride,
                        column,
                        TRANSPOSED,
                        SINGLE_K,
                        BLOCK_N,
                        STAGES,
                    )
            if together:
                _many_tokens(
                    x_row,
                    matrix,
                    out_row,
                    length,
                    used_k,
                    used_n,
                    row_stride,
                    x_stride,
                    out_stride,
                    column,
                    TRANSPOSED,
                    TILE,
                    TILE_K,
                    BLOCK_N,
                    FLOAT32_DOT,
                )
