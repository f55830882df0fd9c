"""Device code of ``core_apply``. Imported only when a kernel is launched; needs Triton."""
# mypy: disable-error-code="misc, no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


# `tokens` is any number: specialised (on 1, and on multiples of 16), it would compile new variants
# in the middle of serving. It only masks; what is wide are the loads along a row.
@triton.jit(do_not_specialize=["tokens"])
def core_apply_kernel(
    y_ptr,
    h_ptr,
    arena_ptr,
    addresses_ptr,
    ranks_ptr,
    basis_ptr,
    tokens,
    n,
    columns,
    y_stride,
    h_stride,
    basis_stride,
    RANK: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGN: tl.constexpr,
    FLOAT32_DOT: tl.constexpr,
):
    """One program adds a ``(TILE tokens, BLOCK_N outputs)`` tile of ``(h Rᵀ) Bᵀ`` to y.

    At few tokens the time is that of the longest chain of dependent loads. So everything that
    needs no address (y, h, ranks) is requested first, together with the addresses; then R,
    ``CHUNK`` of its rows at a time for all tokens at once.
    """
    token = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    live = token < tokens
    address = tl.load(addresses_ptr + token, mask=live, other=-1)
    rank = tl.load(ranks_ptr + token, mask=live, other=0)
    j = tl.arange(0, RANK)
    h = tl.load(
        h_ptr + token[:, None] * h_stride + j[None, :],
        mask=live[:, None] & (j < columns)[None, :],
        other=0.0,
    )
    out = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    y_ptrs = y_ptr + token[:, None] * y_stride + out[None, :]
    y = tl.load(y_ptrs, mask=live[:, None] & (out < n)[None, :], other=0.0)
    if tl.max(address, 0) >= 0:
        used = address >= 0
        address = tl.multiple_of(address, ALIGN)
        rank = tl.multiple_of(tl.where(used, rank, 0), ALIGN)
        used_h = tl.where(j[None, :] < rank[:, None], h.to(tl.float32), 0.0)
        y_mask = used[:, None] & (out < n)[None, :]
        acc = y.to(tl.float32)
        for first in tl.static_range(0, RANK, CHUNK):
            i = first + tl.arange(0, CHUNK)
            r = tl.load(
                arena_ptr
                + address[:, None, None]
                + (i[None, :, None] * rank[:, None, None] + j[None, None, :]),
                mask=(i[None, :, None] < rank[:, None, None])
                & (j[None, None, :] < rank[:, None, None]),
                other=0.0,
            ).to(tl.float32)
            mixed = tl.sum(r * used_h[:, None, :], axis=2)
            basis = tl.load(
                basis_ptr + out[None, :] * basis_stride + i[:, None],
                mask=(out < n)[None, :] & (i < columns)[:, None],
                other=0.0,
            )
            if FLOAT32_DOT:
                basis = basis.to(tl.float32)
            acc = tl.dot(mixed.to(basis.dtype), basis, acc, input_precision="ieee")
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=y_mask)


@triton.jit(do_not_specialize=["tokens"])
def core_mix_kernel(
    u_ptr,
    h_ptr,
    arena_ptr,
    addresses_ptr,
    ranks_ptr,
    tokens,
    width,
    u_stride,
    h_stride,
    RANK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """``u[t] = h[t, :r] Rᵀ``, zero beyond the token's rank and for tokens without adapter.

    Program ``(t, c)`` writes rows ``c·CHUNK …`` of R times h for ``TILE`` tokens.
    """
    token = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    live = token < tokens
    address = tl.load(addresses_ptr + token, mask=live, other=-1)
    rank = tl.load(ranks_ptr + token, mask=address >= 0, other=0)
    address = tl.multiple_of(address, ALIGN)
    rank = tl.multiple_of(rank, ALIGN)
    j = tl.arange(0, RANK)
    i = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    h = tl.load(
        h_ptr + token[:, None] * h_stride + j[None, :],
        mask=j[None, :] < rank[:, None],
        other=0.0,
    ).to(tl.float32)
    r = tl.load(
        arena_ptr
        + address[:, None, None]
        + (i[None, :, None] * rank[:, None, None] + j[None, None, :]),
        mask=(i[None, :, None] < rank[:, None, None]) & (j[None, None, :] < rank[:, None, None]),
        other=0.0,
    ).to(tl.float32)
    mixed = tl.sum(r * h[:, None, :], axis=2)
    tl.store(
        u_ptr + token[:, None] * u_stride + i[None, :],
        mixed.to(u_ptr.dtype.element_ty),
        mask=live[:, None] & (i < width)[None, :],
    )


@triton.jit
def load_owner(addresses_ptr, ranks_ptr, firsts_ptr, token, live, ALIGN: tl.constexpr):
    """Address, rank and first column of each token's adapter; -1, 0, 0 past the last token.

    ALIGN is told to the compiler here: on a function's argument it would be lost in inlining.
    """
    address = tl.load(addresses_ptr + token, mask=live, other=-1)
    rank = tl.multiple_of(tl.load(ranks_ptr + token, mask=live, other=0), ALIGN)
    first = tl.multiple_of(tl.load(firsts_ptr + token, mask=live, other=0), ALIGN)
    return address, rank, first


@triton.jit
def load_matrices(
    arena_ptr, address, rank, first, matrix, i, RANK: tl.constexpr, ALIGN: tl.constexpr
):
    """Rows ``i`` of every token's R ``(TILE, len(i), RANK)``, in one access.

    R lies at the columns ``first … first + rank`` of the joint basis, both ways; zero elsewhere,
    and without adapter. Nothing but ALIGN decides how wide R is loaded: a mask that knows less
    narrows every load.
    """
    row = i[None, :] - first[:, None]
    column = tl.arange(0, RANK)[None, :] - first[:, None]
    has_row = (row >= 0) & (row < rank[:, None]) & (address >= 0)[:, None]
    has_column = (column >= 0) & (column < rank[:, None])
    start = tl.multiple_of(address + matrix * rank * rank, ALIGN)
    return tl.load(
        arena_ptr
        + start[:, None, None]
        + (row[:, :, None] * rank[:, None, None] + column[:, None, :]),
        mask=has_row[:, :, None] & has_column[:, None, :],
        other=0.0,
    )


@triton.jit
def load_h(
    source_ptr, token, live, source_stride, h_column, module, RANK: tl.constexpr,
    MODULES: tl.constexpr,
):  # fmt: skip
    """h of a module ``(TILE, RANK)`` from its blocks of 16 columns in a widened GEMM's output."""
    j = tl.arange(0, RANK)
    if RANK == 16:  # without divisions, which make the compiler move it through shared memory
        at = h_column + module * 16 + j
    else:
        at = h_column + j // 16 * (MODULES * 16) + module * 16 + j % 16
    return tl.load(
        source_ptr + token[:, None] * source_stride + at[None, :], mask=live[:, None], other=0.0
    )


@triton.jit
def mix(r, h, address, rank, first, RANK: tl.constexpr):
    """``h Rᵀ`` float32 ``(TILE, rows of r)``. Columns of h that a token does not use may hold
    anything.
    """
    local = tl.arange(0, RANK)[None, :] - first[:, None]
    used = (local >= 0) & (local < rank[:, None]) & (address >= 0)[:, None]
    used_h = tl.where(used, h.to(tl.float32), 0.0)
    return tl.sum(r.to(tl.float32) * used_h[:, None, :], axis=2)


@triton.jit
def load_mixed(
    mixed_ptr, token, live, mixed_stride, module, RANK: tl.constexpr, MODULES: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """``h Rᵀ`` float32 ``(TILE, RANK)``, made before: the sum of its splits, in their order."""
    j = tl.arange(0, RANK)
    ptrs = mixed_ptr + (token[:, None] * MODULES + module) * RANK + j[None, :]
    mixed = tl.load(ptrs, mask=live[:, None], other=0.0)
    for split in tl.static_range(1, SPLITS):
        mixed += tl.load(
            ptrs + tl.cast(mixed_stride, tl.int64) * split, mask=live[:, None], other=0.0
        )
    return mixed


@triton.jit
def load_basis(basis_ptr, out, inside, basis_stride, RANK: tl.constexpr):
    """B ``(RANK, OUT)`` at the outputs ``out`` that are ``inside``."""
    i = tl.arange(0, RANK).to(tl.int64)
    return tl.load(
        basis_ptr + i[:, None] * basis_stride + out[None, :], mask=inside[None, :], other=0.0
    )


@triton.jit
def add_delta(acc, mixed, basis, FLOAT32_DOT: tl.constexpr):
    """``acc (TILE, OUT) + mixed Bᵀ``."""
    if FLOAT32_DOT:
        basis = basis.to(tl.float32)
    return tl.dot(mixed.to(basis.dtype), basis, acc, input_precision="ieee")


@triton.jit
def row_factor(sums_ptr, token, live, sums_stride, parts, width, eps, PARTS: tl.constexpr):
    """What the deferred RMS norm multiplies each row by: ``(TILE,)``."""
    part = tl.arange(0, PARTS)
    sums = tl.load(
        sums_ptr + part[None, :].to(tl.int64) * sums_stride + token[:, None],
        mask=live[:, None] & (part < parts)[None, :],
        other=0.0,
    )
    return tl.rsqrt(tl.sum(sums, axis=1) / width + eps)
