"""Device code of paged attention. Imported only when a kernel is launched; needs Triton.

Decode and prefill share one loop over tiles of keys (``_attend``): online softmax in base 2 with
float32 sums. Rows of the query tile are the query heads that share a kv head, times some tokens.
"""
# mypy: disable-error-code="misc, no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Below every score. Finite, so that a query whose first tile is all masked has exp2(-inf - LEAST)
# = 0 there and not exp2(nan).
LEAST = tl.constexpr(-1e30)
# These change from step to step. Specialised (on 1, and on multiples of 16), each would compile
# new variants in the middle of serving.
VOLATILE = ["rows", "splits", "min_split", "window", "table_stride"]
# A prefill's rows come behind any number of decode rows, so these start anywhere. That costs
# nothing: contexts are read one at a time, and where the stride of a table is not known no row of
# it is known to be aligned.
ANYWHERE = ["tables_ptr", "contexts_ptr"]


@triton.jit
def _load_tile(base, slot, live, d, position_stride, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Cache slots ``(TILE, DIM)``; zeros where not live and beyond HEAD_DIM."""
    at = base + (slot * position_stride)[:, None] + d[None, :]
    if MASKED and d.shape[0] > HEAD_DIM:
        tile = tl.load(at, mask=live[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    elif MASKED:
        tile = tl.load(at, mask=live[:, None], other=0.0)
    elif d.shape[0] > HEAD_DIM:
        tile = tl.load(at, mask=(d < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def _attend(
    q,
    top,
    total,
    acc,
    keys_ptr,
    values_ptr,
    table_ptr,
    first,
    last,
    lowest,
    context,
    at,
    scale,
    window,
    softcap,
    position_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FLOAT32_DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add the keys ``first … last`` to the running softmax of the queries ``q (M, DIM)``.

    ``top``, ``total`` ``(M,)`` and ``acc (M, DIM)`` are its state: largest score, sum of weights,
    weighted values. ``at (M,)`` is each query's position. ``first`` is a multiple of TILE. Nothing
    outside ``lowest … context`` is read; without MASKED the caller knows that all of the keys lie
    inside, and that every query sees them all.
    """
    d = tl.arange(0, q.shape[1])
    for start in tl.range(first, last, TILE, num_stages=STAGES):
        key = start + tl.arange(0, TILE)
        live = (key >= lowest) & (key < context)
        if BLOCK_TOKENS % TILE == 0:  # the tile lies in one block
            block = tl.load(table_ptr + start // BLOCK_TOKENS).to(tl.int64)
            base = (block * BLOCK_TOKENS + start % BLOCK_TOKENS) * position_stride
            slot = tl.arange(0, TILE)
        else:
            if MASKED:
                block = tl.load(table_ptr + key // BLOCK_TOKENS, mask=live, other=0)
            else:
                block = tl.load(table_ptr + key // BLOCK_TOKENS)
            base = 0
            slot = block.to(tl.int64) * BLOCK_TOKENS + key % BLOCK_TOKENS
        k = _load_tile(keys_ptr + base, slot, live, d, position_stride, MASKED, HEAD_DIM)
        v = _load_tile(values_ptr + base, slot, live, d, position_stride, MASKED, HEAD_DIM)
        if FLOAT32_DOT:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if SOFTCAP:
            # c·tanh(s/c), written with what both the compiler and the interpreter have.
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
        scores = scores * LOG2_E
        if MASKED:
            seen = live[None, :] & (key[None, :] <= at[:, None])
            if WINDOW:
                seen = seen & (key[None, :] > at[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = higher
    return top, total, acc


@triton.jit
def _split_range(context, splits, min_split, window, WINDOW: tl.constexpr, TILE: tl.constexpr):
    """How a row's keys are divided: first key that is seen, where tiles begin, keys per split.

    Only the row's own context decides, so a short row takes few of the launch's splits.
    """
    lowest = 0
    if WINDOW:
        lowest = tl.maximum(context - window, 0)
    begin = lowest // TILE * TILE
    each = tl.maximum(tl.cdiv(context - begin, splits), min_split)
    each = tl.cdiv(each, TILE) * TILE
    used = tl.maximum(tl.cdiv(context - begin, each), 1)
    return lowest, begin, each, used


@triton.jit(do_not_specialize=VOLATILE)
def attention_decode_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    tables_ptr,
    contexts_ptr,
    out_ptr,
    partial_ptr,
    weight_ptr,
    scale,
    window,
    softcap,
    splits,
    min_split,
    table_stride,
    q_stride,
    q_head_stride,
    out_stride,
    position_stride,
    head_stride,
    GROUP: tl.constexpr,
    ROWS_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FLOAT32_DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program ``(kv head, row, split)``: one query token's heads of a group, over part of its keys.

    The kv head is the fastest program axis: neighbours read neighbouring memory. A row that needs
    one split is finished here; others leave normalised partial results and the log2 of their
    weight to ``attention_reduce_kernel``.
    """
    kv_head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    context = tl.load(contexts_ptr + row)
    lowest, begin, each, used = _split_range(context, splits, min_split, window, WINDOW, TILE)
    if split < used:
        i = tl.arange(0, ROWS_M)
        d = tl.arange(0, DIM)
        head = kv_head * GROUP + i
        inside = (i < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
        q = tl.load(
            q_ptr + row * q_stride + head[:, None] * q_head_stride + d[None, :],
            mask=inside,
            other=0.0,
        )
        if FLOAT32_DOT:
            q = q.to(tl.float32)
        first = begin + split * each
        top = tl.full((ROWS_M,), LEAST, tl.float32)
        total = tl.zeros((ROWS_M,), tl.float32)
        acc = tl.zeros((ROWS_M, DIM), tl.float32)
        top, total, acc = _attend(
            q,
            top,
            total,
            acc,
            keys_ptr + kv_head.to(tl.int64) * head_stride,
            values_ptr + kv_head.to(tl.int64) * head_stride,
            tables_ptr + row * table_stride,
            first,
            tl.minimum(first + each, context),
            lowest,
            context,
            context - 1 + i * 0,
            scale,
            window,
            softcap,
            position_stride,
            HEAD_DIM,
            BLOCK_TOKENS,
            TILE,
            True,
            False,  # a decode row's window is exactly what `lowest` says
            SOFTCAP,
            FLOAT32_DOT,
            STAGES,
        )
        # A padding row (context 0) has no weight at all, and becomes zeros.
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        if used == 1:
            tl.store(
                out_ptr + row * out_stride + head[:, None] * HEAD_DIM + d[None, :],
                acc.to(out_ptr.dtype.element_ty),
                mask=inside,
            )
        else:
            heads = tl.num_programs(0) * GROUP
            part = (row * heads + head) * splits + split
            tl.store(partial_ptr + part[:, None] * HEAD_DIM + d[None, :], acc, mask=inside)
            tl.store(weight_ptr + part, top + tl.log2(total), mask=i < GROUP)


@triton.jit(do_not_specialize=VOLATILE)
def attention_reduce_kernel(
    partial_ptr,
    weight_ptr,
    contexts_ptr,
    out_ptr,
    window,
    splits,
    min_split,
    out_stride,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Program ``(head, row)`` joins the partial results of one head, all in one access."""
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    context = tl.load(contexts_ptr + row)
    _, _, _, used = _split_range(context, splits, min_split, window, WINDOW, TILE)
    if used > 1:
        s = tl.arange(0, SPLITS)
        d = tl.arange(0, DIM)
        part = (row * tl.num_programs(0) + head) * splits + s
        weight = tl.load(weight_ptr + part, mask=s < used, other=float("-inf"))
        partial = tl.load(
            partial_ptr + part[:, None] * HEAD_DIM + d[None, :],
            mask=(s < used)[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        )
        share = tl.exp2(weight - tl.max(weight, 0))
        joined = tl.sum(partial * share[:, None], 0) / tl.sum(share, 0)
        tl.store(
            out_ptr + row * out_stride + head * HEAD_DIM + d,
            joined.to(out_ptr.dtype.element_ty),
            mask=d < HEAD_DIM,
        )


@triton.jit(do_not_specialize=VOLATILE, do_not_specialize_on_alignment=ANYWHERE)
def attention_prefill_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    tables_ptr,
    contexts_ptr,
    starts_ptr,
    out_ptr,
    scale,
    window,
    softcap,
    rows,
    table_stride,
    q_stride,
    q_head_stride,
    out_stride,
    position_stride,
    head_stride,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FLOAT32_DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program ``(kv head, tile)``: a few neighbouring tokens of one row, all heads of a group.

    Row ``i`` owns the tiles from ``starts[i] // QUERIES + i`` on, which is room enough for its
    tokens whatever the lengths are: the grid depends on the numbers of tokens and rows alone, and
    a tile finds its row by one load of all starts. Late tiles, which see most keys, start first.
    """
    QUERIES: tl.constexpr = ROWS_M // GROUP
    kv_head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    r = tl.arange(0, ROWS)
    starts = tl.load(starts_ptr + r, mask=r < rows, other=0)
    owned = (starts // QUERIES + r <= tile) & (r < rows)
    row = tl.sum(owned.to(tl.int32), 0) - 1
    start = tl.load(starts_ptr + row)
    new = tl.load(starts_ptr + row + 1) - start
    context = tl.load(contexts_ptr + row)
    first_query = (tile - (start // QUERIES + row)) * QUERIES
    if first_query < new:
        i = tl.arange(0, ROWS_M)
        d = tl.arange(0, DIM)
        query = first_query + i // GROUP
        head = kv_head * GROUP + i % GROUP
        inside = ((i < QUERIES * GROUP) & (query < new))[:, None] & (d < HEAD_DIM)[None, :]
        token = (start + query).to(tl.int64)
        q = tl.load(
            q_ptr + token[:, None] * q_stride + head[:, None] * q_head_stride + d[None, :],
            mask=inside,
            other=0.0,
        )
        if FLOAT32_DOT:
            q = q.to(tl.float32)
        earliest = context - new + first_query  # position of the tile's first query
        end = tl.minimum(earliest + QUERIES, context)
        lowest = 0
        full = (earliest + 1) // TILE * TILE  # every query sees all keys before this one
        if WINDOW:
            lowest = tl.maximum(earliest - window + 1, 0)
            full = lowest // TILE * TILE
        begin = lowest // TILE * TILE
        at = context - new + query
        row_keys = keys_ptr + kv_head.to(tl.int64) * head_stride
        row_values = values_ptr + kv_head.to(tl.int64) * head_stride
        table = tables_ptr + row.to(tl.int64) * table_stride
        top = tl.full((ROWS_M,), LEAST, tl.float32)
        total = tl.zeros((ROWS_M,), tl.float32)
        acc = tl.zeros((ROWS_M, DIM), tl.float32)
        if not WINDOW:
            top, total, acc = _attend(
                q, top, total, acc, row_keys, row_values, table, begin, full, lowest, context, at,
                scale, window, softcap, position_stride,
                HEAD_DIM, BLOCK_TOKENS, TILE, False, False, SOFTCAP, FLOAT32_DOT, STAGES,
            )  # fmt: skip
        top, total, acc = _attend(
            q, top, total, acc, row_keys, row_values, table, full, end, lowest, context, at,
            scale, window, softcap, position_stride,
            HEAD_DIM, BLOCK_TOKENS, TILE, True, WINDOW, SOFTCAP, FLOAT32_DOT, STAGES,
        )  # fmt: skip
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(
            out_ptr + token[:, None] * out_stride + head[:, None] * HEAD_DIM + d[None, :],
            acc.to(out_ptr.dtype.element_ty),
            mask=inside,
        )
