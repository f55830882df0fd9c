"""Device code of ``sample_tokens``. Imported only when a kernel is launched; needs Triton.

Two launches: ``sample_scan_kernel`` reads the logits once, many programs a row;
``sample_pick_kernel`` joins what they found, one program a row, and draws where a row asks for it.

The order of the tokens is that of the logits as they lie in memory: scale and softcap are
increasing and change probabilities only. So a threshold is a logit, and is searched for in *keys*:
the float's bits as an integer that grows with the float, shortened to the bits its dtype has.
"""
# mypy: disable-error-code="misc, no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from shoal.kernels.sample_tokens.reference import TEMPERATURE_MIN

GREEDY_BELOW = tl.constexpr(TEMPERATURE_MIN)
LOG2_E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))
LARGEST = tl.constexpr(3.4028234663852886e38)
SIGN = tl.constexpr(0x7FFFFFFF)
LEAST_KEY = tl.constexpr(-2139095040)  # of -LARGEST, in float32


@triton.jit
def _adjusted(x, scale, softcap, SOFTCAP: tl.constexpr):
    """The logit the softmax sees; -inf stays -inf."""
    y = x * scale
    if SOFTCAP:
        # c·tanh(y/c), written with what both the compiler and the interpreter have.
        y = tl.where(y == -INF, y, softcap * (2 * tl.sigmoid(2 * y / softcap) - 1))
    return y


@triton.jit
def _weight(x, scale, softcap, top, sharpness, SOFTCAP: tl.constexpr):
    """Probability relative to the most probable token's; ``sharpness`` is log2(e)/temperature."""
    return tl.exp2((_adjusted(x, scale, softcap, SOFTCAP) - top) * sharpness)


@triton.jit
def _load(row_ptr, at, stop):
    """Logits in float32, -inf from ``stop`` on."""
    return tl.load(row_ptr + at, mask=at < stop, other=-INF).to(tl.float32)


@triton.jit
def _key(x, SHIFT: tl.constexpr):
    """An int64 that grows with the float32 scalar ``x``; exact where the dtype holds ``x``."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & SIGN)) >> SHIFT).to(tl.int64)


@triton.jit
def _value(key, SHIFT: tl.constexpr):
    """The logit of a key, float32."""
    bits = (key.to(tl.int32)) << SHIFT
    # Of a negative float the bits below the dtype's are ones in this order.
    bits = bits | ((bits >> 31) & ((1 << SHIFT) - 1))
    return (bits ^ ((bits >> 31) & SIGN)).to(tl.float32, bitcast=True)


@triton.jit
def _by_thread(values, EACH: tl.constexpr):
    """Sums of EACH neighbours: those one thread loaded at once, so that it holds one register."""
    return tl.sum(tl.reshape(values, (values.shape[0] // EACH, EACH)), 1)


@triton.jit
def _search(
    row_ptr,
    vocab,
    scale,
    softcap,
    top,
    sharpness,
    low,
    high,
    target,
    COUNT: tl.constexpr,
    SHIFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest key in ``low … high`` whose tail (tokens of that logit or above) weighs
    ``target`` or more, and the weight of the tokens above it.

    ``low`` is taken to satisfy that, ``high`` not to. A token weighs its probability, or one
    with COUNT. Every pass over the row tries three keys: it costs about what two would.
    """
    EACH: tl.constexpr = 16 // (row_ptr.dtype.element_ty.primitive_bitwidth // 8)
    lane = tl.arange(0, BLOCK)
    above = 0.0
    while high - low > 1:
        width = high - low
        key_a = low + tl.maximum(width // 4, 1)
        key_b = low + tl.maximum(width // 2, 1)
        key_c = low + width - tl.maximum(width // 4, 1)
        a, b, c = _value(key_a, SHIFT), _value(key_b, SHIFT), _value(key_c, SHIFT)
        sum_a = tl.zeros((BLOCK // EACH,), tl.float32)
        sum_b = tl.zeros((BLOCK // EACH,), tl.float32)
        sum_c = tl.zeros((BLOCK // EACH,), tl.float32)
        for begin in tl.range(0, vocab, BLOCK, loop_unroll_factor=2):
            x = _load(row_ptr, begin + lane, vocab)
            w = 1.0 if COUNT else _weight(x, scale, softcap, top, sharpness, SOFTCAP)
            sum_a += _by_thread(tl.where(x >= a, w, 0.0), EACH)
            sum_b += _by_thread(tl.where(x >= b, w, 0.0), EACH)
            sum_c += _by_thread(tl.where(x >= c, w, 0.0), EACH)
        tail_a, tail_b, tail_c = tl.sum(sum_a, 0), tl.sum(sum_b, 0), tl.sum(sum_c, 0)
        above = tl.where(
            tail_c >= target,
            above,
            tl.where(tail_b >= target, tail_c, tl.where(tail_a >= target, tail_b, tail_a)),
        )
        high = tl.where(
            tail_c >= target,
            high,
            tl.where(tail_b >= target, key_c, tl.where(tail_a >= target, key_b, key_a)),
        )
        low = tl.where(
            tail_c >= target,
            key_c,
            tl.where(tail_b >= target, key_b, tl.where(tail_a >= target, key_a, low)),
        )
    return low, above


@triton.jit
def _tail(
    row_ptr, vocab, scale, softcap, top, sharpness, least,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Weight of the tokens whose logit is ``least`` or above."""
    EACH: tl.constexpr = 16 // (row_ptr.dtype.element_ty.primitive_bitwidth // 8)
    total = tl.zeros((BLOCK // EACH,), tl.float32)
    for begin in tl.range(0, vocab, BLOCK, loop_unroll_factor=2):
        x = _load(row_ptr, begin + tl.arange(0, BLOCK), vocab)
        w = _weight(x, scale, softcap, top, sharpness, SOFTCAP)
        total += _by_thread(tl.where(x >= least, w, 0.0), EACH)
    return tl.sum(total, 0)


@triton.jit
def _choose(mass, uniform):
    """Inverse CDF over some float64 masses: the index, and how far into that mass to go."""
    i = tl.arange(0, mass.shape[0])
    cumulative = tl.cumsum(mass, 0)
    target = uniform * tl.sum(mass, 0)
    last = tl.max(tl.where(mass > 0, i, 0), 0)
    # A parallel sum need not be monotone to the last bit: never land on an empty mass.
    chosen = tl.min(tl.where((cumulative > target) & (mass > 0), i, last), 0)
    before = tl.sum(tl.where(i == chosen, cumulative - mass, 0.0), 0)
    return chosen, tl.maximum(target - before, 0.0)


# Specialised (on 1, and on multiples of 16), span and parts would compile variants while serving.
@triton.jit(do_not_specialize=["span"])
def sample_scan_kernel(
    logits_ptr,
    temperature_ptr,
    scale_ptr,
    best_ptr,
    index_ptr,
    chunk_max_ptr,
    chunk_sum_ptr,
    vocab,
    chunks,
    span,
    row_stride,
    softcap,
    CHUNK: tl.constexpr,
    GREEDY_ONLY: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Program ``(part, row)``: the best logit of ``span`` chunks and where it is, +inf if one is
    NaN or +inf; for a row that is drawn also each chunk's maximum and sum of weights.

    A chunk's sums do not depend on ``span``, which depends on the number of rows.
    """
    row = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, CHUNK)
    row_ptr = logits_ptr + row * row_stride
    first = tl.program_id(0) * span
    last = tl.minimum(first + span, chunks)
    best = tl.full((CHUNK,), float("-inf"), tl.float32)
    where = tl.zeros((CHUNK,), tl.int32)
    for chunk in tl.range(first, last, loop_unroll_factor=2):
        x = _load(row_ptr, chunk * CHUNK + lane, vocab)
        # One instruction that keeps a NaN; then "has it changed" is the only comparison.
        higher = tl.maximum(best, x, propagate_nan=tl.PropagateNan.ALL)
        where = tl.where(higher != best, chunk, where)
        best = higher
    spoilt = tl.max((best < INF).to(tl.int32) ^ 1, 0)
    value = tl.max(best, 0)
    index = tl.min(tl.where(best == value, where * CHUNK + lane, vocab), 0)
    at = row * tl.num_programs(0) + tl.program_id(0)
    tl.store(best_ptr + at, tl.where(spoilt != 0, INF, value))
    tl.store(index_ptr + at, index)
    if not GREEDY_ONLY:
        temperature = tl.load(temperature_ptr + row)
        if temperature > GREEDY_BELOW:
            scale = 1.0
            if scale_ptr is not None:
                scale = tl.load(scale_ptr + row)
            for chunk in range(first, last):
                x = _load(row_ptr, chunk * CHUNK + lane, vocab)
                y = _adjusted(x, scale, softcap, SOFTCAP)
                top = tl.max(y, 0)
                tl.store(chunk_max_ptr + row * chunks + chunk, top)
                top = tl.where(top == -INF, 0.0, top)
                total = tl.sum(tl.exp2((y - top) * (LOG2_E / temperature)), 0)
                tl.store(chunk_sum_ptr + row * chunks + chunk, total)


@triton.jit(do_not_specialize=["parts"])
def sample_pick_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    uniform_ptr,
    scale_ptr,
    best_ptr,
    index_ptr,
    chunk_max_ptr,
    chunk_sum_ptr,
    tokens_ptr,
    vocab,
    chunks,
    parts,
    row_stride,
    softcap,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    SHIFT: tl.constexpr,
    GREEDY_ONLY: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """One row's token. CHUNKS and GROUPS are powers of two, GROUP a multiple of BLOCK."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, CHUNKS)
    found = tl.load(best_ptr + row * parts + part, mask=part < parts, other=-INF)
    index = tl.load(index_ptr + row * parts + part, mask=part < parts, other=vocab)
    best = tl.max(found, 0)
    token = tl.min(tl.where(found == best, index, vocab), 0)
    usable = (best > -INF) & (best < INF)
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + row)
        usable = usable & (scale > 0) & (scale < INF)
    if GREEDY_ONLY:
        tl.store(tokens_ptr + row, tl.where(usable, token, -1).to(tl.int64))
    else:
        temperature = tl.load(temperature_ptr + row)
        if usable & (temperature > GREEDY_BELOW):
            token = _draw(
                token, logits_ptr + row * row_stride, best, scale, softcap, LOG2_E / temperature,
                tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row),
                tl.load(uniform_ptr + row), chunk_max_ptr + row * chunks,
                chunk_sum_ptr + row * chunks, vocab, chunks,
                CHUNK, CHUNKS, BLOCK, GROUP, GROUPS, SHIFT, SOFTCAP,
            )  # fmt: skip
        tl.store(tokens_ptr + row, tl.where(usable, token, -1).to(tl.int64))


@triton.jit
def _draw(
    fallback,
    row_ptr,
    best,
    scale,
    softcap,
    sharpness,
    top_k,
    top_p,
    min_p,
    uniform,
    chunk_max_ptr,
    chunk_sum_ptr,
    vocab,
    chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    SHIFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """A token drawn after the filters; ``best`` is the row's largest logit, at ``fallback``.

    The filters leave every logit of ``kept_from`` or above and, of those from ``tied_from`` up
    to there (which are equal), the first ``ties``; less what min-p refuses.
    """
    lane = tl.arange(0, BLOCK)
    top = _adjusted(best, scale, softcap, SOFTCAP)
    chunk = tl.arange(0, CHUNKS)
    chunk_max = tl.load(chunk_max_ptr + chunk, mask=chunk < chunks, other=-INF)
    chunk_sum = tl.load(chunk_sum_ptr + chunk, mask=chunk < chunks, other=0.0)
    mass = chunk_sum * tl.exp2((chunk_max - top) * sharpness)
    total = tl.sum(mass, 0)
    limited = (top_k > 0) & (top_k < vocab)
    # Not NaN, and at most one: the most probable token always stays.
    least_weight = tl.minimum(tl.maximum(min_p, 0.0), 1.0)

    kept_from = -LARGEST
    tied_from = -LARGEST
    ties = 0
    seen = 0
    if limited | (top_p < 1) | (min_p > 0):
        best = tl.where(best == 0, 0.0, best)  # not -0, whose key is another
        beyond = _key(best, SHIFT) + 1
        low = tl.full((), LEAST_KEY >> SHIFT, tl.int64)
        candidates = vocab
        if limited:
            low, above = _search(
                row_ptr, vocab, scale, softcap, top, sharpness, low, beyond,
                top_k.to(tl.float32), True, SHIFT, SOFTCAP, BLOCK,
            )  # fmt: skip
            tied_from = _value(low, SHIFT)
            kept_from = _value(low + 1, SHIFT)
            ties = tl.maximum(top_k - above.to(tl.int32), 0)
            candidates = top_k
        if top_p < 1:
            border = low
            if limited:
                total = _tail(
                    row_ptr, vocab, scale, softcap, top, sharpness, kept_from, SOFTCAP, BLOCK
                ) + ties * _weight(tied_from, scale, softcap, top, sharpness, SOFTCAP)
            # Tokens below this weight have, all together, less than what top-p leaves out (the
            # half is for rounding): a narrow range saves passes over the row.
            weight = 0.5 * (1 - top_p) * total / candidates
            floor = top + tl.log2(weight) / sharpness
            if SOFTCAP:  # its inverse is further from zero: no bound below zero
                floor = tl.where(floor > 0, floor, -LARGEST)
            floor = tl.maximum(floor / scale, -LARGEST)
            low = tl.maximum(low, tl.minimum(_key(floor, SHIFT) - 1, beyond - 1))
            target = (top_p * total).to(tl.float32)
            low, above = _search(
                row_ptr, vocab, scale, softcap, top, sharpness, low, beyond, target,
                False, SHIFT, SOFTCAP, BLOCK,
            )  # fmt: skip
            tied_from = _value(low, SHIFT)
            kept_from = _value(low + 1, SHIFT)
            each = _weight(tied_from, scale, softcap, top, sharpness, SOFTCAP)
            wanted = tl.ceil(tl.maximum(target - above, 0.0) / tl.maximum(each, 1e-38))
            wanted = tl.minimum(tl.maximum(wanted, 1.0), 1e9).to(tl.int32)
            ties = tl.where(limited & (low == border), tl.minimum(wanted, ties), wanted)

        # Mass and ties of each group of GROUP tokens.
        group = tl.arange(0, GROUPS)
        group_mass = tl.zeros((GROUPS,), tl.float32)
        group_ties = tl.zeros((GROUPS,), tl.int32)
        for g in range(0, tl.cdiv(vocab, GROUP)):
            kept = tl.zeros((BLOCK,), tl.float32)
            tied = tl.zeros((BLOCK,), tl.int32)
            for begin in tl.static_range(0, GROUP, BLOCK):
                x = _load(row_ptr, g * GROUP + begin + lane, vocab)
                w = _weight(x, scale, softcap, top, sharpness, SOFTCAP)
                kept += tl.where((x >= kept_from) & (w >= least_weight), w, 0.0)
                tied += ((x >= tied_from) & (x < kept_from)).to(tl.int32)
            group_mass = tl.where(group == g, tl.sum(kept, 0), group_mass)
            group_ties = tl.where(group == g, tl.sum(tied, 0), group_ties)
        each = _weight(tied_from, scale, softcap, top, sharpness, SOFTCAP)
        each = tl.where(each >= least_weight, each, 0.0)
        earlier = tl.cumsum(group_ties, 0) - group_ties
        used = tl.minimum(tl.maximum(ties - earlier, 0), group_ties)
        chosen, rest = _choose(group_mass.to(tl.float64) + used.to(tl.float64) * each, uniform)
        seen = tl.sum(tl.where(group == chosen, earlier, 0), 0)
        start = chosen * GROUP
        stop = tl.minimum(start + GROUP, vocab)
    else:
        chosen, rest = _choose(mass.to(tl.float64), uniform)
        start = chosen * CHUNK
        stop = tl.minimum(start + CHUNK, vocab)

    token = vocab
    last = -1
    done = 0.0
    rest = rest.to(tl.float32)
    while (start < stop) & (token == vocab):
        at = start + lane
        x = _load(row_ptr, at, stop)
        w = _weight(x, scale, softcap, top, sharpness, SOFTCAP)
        tied = ((x >= tied_from) & (x < kept_from)).to(tl.int32)
        rank = seen + tl.cumsum(tied, 0)
        keep = (x >= kept_from) | ((tied != 0) & (rank <= ties))
        keep = keep & (w >= least_weight) & (w > 0)
        w = tl.where(keep, w, 0.0)
        token = tl.min(tl.where(keep & (done + tl.cumsum(w, 0) > rest), at, vocab), 0)
        last = tl.maximum(last, tl.max(tl.where(keep, at, -1), 0))
        done += tl.sum(w, 0)
        seen += tl.sum(tied, 0)
        start += BLOCK
    # Past the end by rounding: the last one that could be drawn.
    return tl.where(token < vocab, token, tl.where(last >= 0, last, fallback))
