"""Device code of ``silu_mul``. Imported only when a kernel is launched; needs Triton."""
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
    row_factor,
)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """SiLU, or GELU in its tanh form or exact."""
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu_tanh":  # noqa: RET505 - the compiler must not see the other branches
        # (1 + tanh z) / 2 is sigmoid(2 z)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit(do_not_specialize=["matrix", "tokens", "sums_stride"])
def silu_mul_kernel(
    gate_up_ptr,
    bias_ptr,
    out_ptr,
    arena_ptr,
    addresses_ptr,
    ranks_ptr,
    firsts_ptr,
    mixed_ptr,
    basis_ptr,
    sums_ptr,
    tokens,
    width,
    gate_up_stride,
    h_column,
    matrix,
    mixed_stride,
    basis_stride,
    sums_stride,
    parts,
    sums_width,
    sums_eps,
    ACTIVATION: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANK: tl.constexpr,
    ALIGN: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    FLOAT32_DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program makes a ``(TILE tokens, BLOCK_N outputs)`` tile.

    Everything that no kernel of the step writes is requested before the wait (``launching.py``
    says why that is safe): the longest chain of dependent loads, address to R, runs meanwhile.
    """
    token = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    live = token < tokens
    out = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = out < width
    mask = live[:, None] & inside[None, :]
    if arena_ptr is not None:
        address, rank, first = load_owner(addresses_ptr, ranks_ptr, firsts_ptr, token, live, ALIGN)
        i = tl.arange(0, RANK)
        r_gate = load_matrices(arena_ptr, address, rank, first, matrix, i, RANK, ALIGN)
        r_up = load_matrices(arena_ptr, address, rank, first, matrix + 1, i, RANK, ALIGN)
    if basis_ptr is not None:
        basis_gate = load_basis(basis_ptr, out, inside, basis_stride, RANK)
        basis_up = load_basis(basis_ptr, out + width, inside, basis_stride, RANK)
    if bias_ptr is not None:
        bias_gate = tl.load(bias_ptr + out, mask=inside, other=0.0)
        bias_up = tl.load(bias_ptr + width + out, mask=inside, other=0.0)
    if PDL:
        gdc_wait()
    gate_ptrs = gate_up_ptr + token[:, None] * gate_up_stride + out[None, :]
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + width, mask=mask, other=0.0).to(tl.float32)
    if arena_ptr is not None:
        h_gate = load_h(gate_up_ptr, token, live, gate_up_stride, h_column, 0, RANK, 2)
        h_up = load_h(gate_up_ptr, token, live, gate_up_stride, h_column, 1, RANK, 2)
        mixed_gate = mix(r_gate, h_gate, address, rank, first, RANK)
        mixed_up = mix(r_up, h_up, address, rank, first, RANK)
    elif mixed_ptr is not None:
        mixed_gate = load_mixed(mixed_ptr, token, live, mixed_stride, 0, RANK, 2, SPLITS)
        mixed_up = load_mixed(mixed_ptr, token, live, mixed_stride, 1, RANK, 2, SPLITS)
    if sums_ptr is not None:
        factor = row_factor(sums_ptr, token, live, sums_stride, parts, sums_width, sums_eps, PARTS)[
            :, None
        ]
    if basis_ptr is not None:
        gate = add_delta(gate, mixed_gate, basis_gate, FLOAT32_DOT)
        up = add_delta(up, mixed_up, basis_up, FLOAT32_DOT)
    if sums_ptr is not None:
        gate *= factor
        up *= factor
    if bias_ptr is not None:
        gate += bias_gate.to(tl.float32)[None, :]
        up += bias_up.to(tl.float32)[None, :]
    result = activate(gate, ACTIVATION) * up
    out_ptrs = out_ptr + token[:, None] * width + out[None, :]
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=mask)
