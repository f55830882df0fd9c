"""Device code of ``lane_outer``. Imported only when a kernel is launched; needs Triton."""
# mypy: disable-error-code="misc, no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def lane_outer_kernel(
    a_ptr,
    b_ptr,
    firsts_ptr,
    counts_ptr,
    lanes_ptr,
    sums_ptr,
    length,
    m,
    n,
    scale,
    a_row_stride,
    a_stride,
    a_module_stride,
    b_row_stride,
    b_stride,
    b_module_stride,
    lane_stride,
    module_stride,
    m_stride,
    split_stride,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program ``(segment·splits + split, c, module)``: a tile of one lane's ``aᵀ b``.

    It walks over every ``SPLITS``-th row of its lane, so the order of the sum is decided by the
    table alone. With one split the result goes to its lane, otherwise to its segment's place
    among the split's partial sums.
    """
    segment = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    columns = tl.cdiv(n, BLOCK_N)
    i = tl.program_id(1) // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    module = tl.program_id(2).to(tl.int64)
    first = tl.load(firsts_ptr + segment)
    count = tl.load(counts_ptr + segment)
    lane = tl.load(lanes_ptr + segment)
    if count > 0:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for nth in range(split, count, SPLITS):
            row = first.to(tl.int64) + nth
            a_row = a_ptr + row * a_row_stride + module * a_module_stride
            b_row = b_ptr + row * b_row_stride + module * b_module_stride
            for start in range(0, length, TILE):
                token = start + tl.arange(0, TILE)
                live = token < length
                a = tl.load(
                    a_row + token[None, :] * a_stride + i[:, None],
                    mask=live[None, :] & (i < m)[:, None],
                    other=0.0,
                )
                b = tl.load(
                    b_row + token[:, None] * b_stride + j[None, :],
                    mask=live[:, None] & (j < n)[None, :],
                    other=0.0,
                )
                if UPCAST:
                    a = a.to(tl.float32)
                    b = b.to(tl.float32)
                acc = tl.dot(a, b, acc, input_precision=PRECISION)
        place = lane if SPLITS == 1 else segment
        tl.store(
            sums_ptr
            + split * split_stride
            + place.to(tl.int64) * lane_stride
            + module * module_stride
            + i[:, None] * m_stride
            + j[None, :],
            acc * scale,
            mask=(i < m)[:, None] & (j < n)[None, :],
        )


@triton.jit
def lane_sum_kernel(
    sums_ptr,
    counts_ptr,
    lanes_ptr,
    grads_ptr,
    size,
    n,
    segment_stride,
    split_stride,
    lane_stride,
    module_stride,
    m_stride,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the splits of one segment, in their order, and writes them to its lane."""
    segment = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(counts_ptr + segment)
    lane = tl.load(lanes_ptr + segment)
    if count > 0:
        acc = tl.zeros((BLOCK,), dtype=tl.float32)
        module = tl.program_id(2).to(tl.int64)
        source = sums_ptr + segment.to(tl.int64) * segment_stride + module * size
        for split in tl.static_range(SPLITS):
            acc += tl.load(source + split * split_stride + at, mask=at < size, other=0.0)
        target = grads_ptr + lane.to(tl.int64) * lane_stride + module * module_stride
        tl.store(target + at // n * m_stride + at % n, acc, mask=at < size)
