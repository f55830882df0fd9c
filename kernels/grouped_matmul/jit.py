"""Device code of ``shrink`` and ``expand``. Imported only at a launch; needs Triton."""
# mypy: disable-error-code="misc, no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit
def _shrink_one(
    x_row,
    matrix,
    out_row,
    k,
    n,
    column,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Matrix-vector product on the plain arithmetic units; products are summed once, at the end."""
    inside = column < n
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for first in tl.range(0, k, BLOCK_K, num_stages=STAGES):
        i = first + tl.arange(0, BLOCK_K)
        x = tl.load(x_row + i, mask=i < k, other=0.0).to(tl.float32)
        m = tl.load(
            matrix + column[:, None] * k + i[None, :],
            mask=inside[:, None] & (i < k)[None, :],
            other=0.0,
        )
        acc += m.to(tl.float32) * x[None, :]
    tl.store(out_row + column, tl.sum(acc, axis=1).to(out_row.dtype.element_ty), mask=inside)


@triton.jit
def _shrink_many(
    x_row,
    matrix,
    out_row,
    length,
    k,
    n,
    x_stride,
    out_stride,
    column,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FLOAT32_DOT: tl.constexpr,
):
    """Matrix product on the matrix units: the tile's tokens share each load of the matrix."""
    offset = tl.arange(0, TILE).to(tl.int64)
    live = offset < length
    inside = column < n
    acc = tl.zeros((TILE, BLOCK_N), dtype=tl.float32)
    for first in range(0, k, BLOCK_K):
        i = first + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_row + offset[:, None] * x_stride + i[None, :],
            mask=live[:, None] & (i < k)[None, :],
            other=0.0,
        )
        m = tl.load(
            matrix + column[None, :] * k + i[:, None],
            mask=(i < k)[:, None] & inside[None, :],
            other=0.0,
        )
        if FLOAT32_DOT:
            m = m.to(tl.float32)
        acc = tl.dot(x.to(m.dtype), m, acc, input_precision="ieee")
    out_ptrs = out_row + offset[:, None] * out_stride + column[None, :]
    out_mask = live[:, None] & inside[None, :]
    tl.store(out_ptrs, acc.to(out_row.dtype.element_ty), mask=out_mask)


# `modules` is 1 for some groups: compiled for those apart, it would save one multiplication.
@triton.jit(do_not_specialize=["modules", "rank_scale"])
def shrink_kernel(
    x_ptr,
    arena_ptr,
    starts_ptr,
    lengths_ptr,
    addresses_ptr,
    ranks_ptr,
    out_ptr,
    k,
    modules,
    rank_scale,
    x_stride,
    out_stride,
    TILE: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    SINGLE_N: tl.constexpr,
    SINGLE_K: tl.constexpr,
    ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
    FLOAT32_DOT: tl.constexpr,
):
    """Program ``(tile, c)`` writes outputs ``c·SINGLE_N …`` of one tile.

    The tile is the fastest program axis: tiles of one adapter run side by side and find its
    matrix in the cache. SINGLE_K > 0 sends tiles of one token to the plain arithmetic units, with
    few outputs per program; where tokens share a tile, every ``TILE_N / SINGLE_N``-th program
    takes the outputs of all until the next one.
    """
    tile = tl.program_id(0)
    block = tl.program_id(1)
    length = tl.load(lengths_ptr + tile)
    start = tl.load(starts_ptr + tile).to(tl.int64)
    record = tl.load(addresses_ptr + tile)
    rank = tl.load(ranks_ptr + tile)
    if length > 0:
        n = rank * modules
        if block * SINGLE_N < n:
            matrix = arena_ptr + tl.multiple_of(record + rank.to(tl.int64) * rank_scale, ALIGN)
            x_row = x_ptr + start * x_stride
            out_row = out_ptr + start * out_stride
            first_column = block.to(tl.int64) * SINGLE_N
            together = length > 0
            if SINGLE_K > 0:
                together = (length > 1) & (block % (TILE_N // SINGLE_N) == 0)
                if length == 1:
                    column = first_column + tl.arange(0, SINGLE_N)
                    _shrink_one(x_row, matrix, out_row, k, n, column, SINGLE_K, SINGLE_N, STAGES)
            if together:
                columns = first_column + tl.arange(0, TILE_N)
                _shrink_many(
                    x_row,
                    matrix,
                    out_row,
                    length,
                    k,
                    n,
                    x_stride,
                    out_stride,
                    columns,
                    TILE,
                    TILE_K,
                    TILE_N,
                    FLOAT32_DOT,
                )


@triton.jit
def _expand_one(
    x_row,
    matrix,
    out_row,
    rank,
    row_stride,
    column,
    inside,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """Matrix-vector product of a matrix whose stored rows are the inputs; added to out.

    With few warps a thread holds all rows of its columns, so summing in every step moves nothing.
    The first rows are requested before the wait: mostly they are all.
    """
    i = tl.arange(0, BLOCK_K)
    m = tl.load(
        matrix + i.to(tl.int64)[:, None] * row_stride + column[None, :],
        mask=(i < rank)[:, None] & inside[None, :],
        other=0.0,
    )
    if PDL:
        gdc_wait()
    x = tl.load(x_row + i, mask=i < rank, other=0.0).to(tl.float32)
    base = tl.load(out_row + column, mask=inside, other=0.0).to(tl.float32)
    acc = tl.sum(m.to(tl.float32) * x[:, None], axis=0)
    for first in range(BLOCK_K, rank, BLOCK_K):
        i = first + tl.arange(0, BLOCK_K)
        x = tl.load(x_row + i, mask=i < rank, other=0.0).to(tl.float32)
        m = tl.load(
            matrix + i.to(tl.int64)[:, None] * row_stride + column[None, :],
            mask=(i < rank)[:, None] & inside[None, :],
            other=0.0,
        )
        acc += tl.sum(m.to(tl.float32) * x[:, None], axis=0)
    sums = base + acc
    tl.store(out_row + column, sums.to(out_row.dtype.element_ty), mask=inside)


@triton.jit
def _expand_many(
    x_row,
    matrix,
    out_row,
    length,
    rank,
    row_stride,
    x_stride,
    out_stride,
    column,
    inside,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FLOAT32_DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    """As ``_shrink_many``, of a matrix whose stored rows are the inputs; added to out."""
    if PDL:
        gdc_wait()
    offset = tl.arange(0, TILE).to(tl.int64)
    live = offset < length
    out_ptrs = out_row + offset[:, None] * out_stride + column[None, :]
    out_mask = live[:, None] & inside[None, :]
    acc = tl.load(out_ptrs, mask=out_mask, other=0.0).to(tl.float32)
    for first in range(0, rank, BLOCK_K):
        i = first + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_row + offset[:, None] * x_stride + i[None, :],
            mask=live[:, None] & (i < rank)[None, :],
            other=0.0,
        )
        m = tl.load(
            matrix + i.to(tl.int64)[:, None] * row_stride + column[None, :],
            mask=(i < rank)[:, None] & inside[None, :],
            other=0.0,
        )
        if FLOAT32_DOT:
            m = m.to(tl.float32)
        acc = tl.dot(x.to(m.dtype), m, acc, input_precision="ieee")
    tl.store(out_ptrs, acc.to(out_row.dtype.element_ty), mask=out_mask)


@triton.jit(do_not_specialize=["rank_scale"])
def expand_kernel(
    x_ptr,
    arena_ptr,
    starts_ptr,
    lengths_ptr,
    addresses_ptr,
    ranks_ptr,
    out_ptr,
    width0,
    width1,
    width2,
    rank_scale,
    x_stride,
    out_stride,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SINGLE: tl.constexpr,
    ALIGN: tl.constexpr,
    FLOAT32_DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program ``(tile, c)`` adds to ``BLOCK_N`` outputs of one module for one tile.

    The second axis counts the blocks of module 0, then those of module 1, then those of module 2;
    absent modules have width 0. SINGLE: tiles of one token take the plain arithmetic units.
    """
    tile = tl.program_id(0)
    block = tl.program_id(1)
    length = tl.load(lengths_ptr + tile)
    start = tl.load(starts_ptr + tile).to(tl.int64)
    record = tl.load(addresses_ptr + tile)
    rank = tl.load(ranks_ptr + tile)
    if length > 0:
        blocks0 = tl.cdiv(width0, BLOCK_N)
        blocks1 = tl.cdiv(width1, BLOCK_N)
        in1 = block >= blocks0
        in2 = block >= blocks0 + blocks1
        module = in1.to(tl.int32) + in2.to(tl.int32)
        before = tl.where(in2, blocks0 + blocks1, tl.where(in1, blocks0, 0))
        begin = tl.where(in2, width0 + width1, tl.where(in1, width0, 0))
        width = tl.where(in2, width2, tl.where(in1, width1, width0))
        column = (block - before) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = column < width
        row_stride = width0 + width1 + width2
        stored = tl.multiple_of(record + rank.to(tl.int64) * rank_scale, ALIGN)
        matrix = arena_ptr + stored + begin
        x_row = x_ptr + start * x_stride + module * rank
        out_row = out_ptr + start * out_stride + begin
        together = length > 0
        if SINGLE:
            together = length > 1
            if length == 1:
                _expand_one(
                    x_row, matrix, out_row, rank, row_stride, column, inside, TILE_K, BLOCK_N, PDL
                )
        if together:
            _expand_many(
                x_row,
                matrix,
                out_row,
                length,
                rank,
                row_stride,
                x_stride,
                out_stride,
                column,
                inside,
                TILE,
                TILE_K,
                FLOAT32_DOT,
                PDL,
            )
