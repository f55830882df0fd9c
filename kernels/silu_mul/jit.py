"""Device code of ``silu_mul``. Imported only when a kernel is launched; needs Triton."""
# mypy: disable-error-code="misc, no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from shoal.kernels.core_apply.jit import add_delta, load_h, load_owner, mix_tile


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


@triton.jit(do_not_specialize=["matrix"])
def silu_mul_kernel(
    gate_up_ptr,
    bias_ptr,
    out_ptr,
    arena_ptr,
    addresses_ptr,
    ranks_ptr,
    firsts_ptr,
    basis_ptr,
    tokens,
    width,
    gate_up_stride,
    h_column,
    columns,
    matrix,
    basis_stride,
    basis_rank_stride,
    ACTIVATION: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANK: tl.constexpr,
    ALIGN: tl.constexpr,
    FLOAT32_DOT: tl.constexpr,
):
    """One program makes a ``(TILE tokens, BLOCK_N outputs)`` tile.

    What needs no address (gate, up, h) is requested before the first use of one.
    """
    token = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    live = token < tokens
    if basis_ptr is not None:
        address, rank, first = load_owner(addresses_ptr, ranks_ptr, firsts_ptr, token, live, ALIGN)
        h_gate = load_h(gate_up_ptr, token, live, gate_up_stride, h_column, columns, RANK)
        h_up = load_h(gate_up_ptr, token, live, gate_up_stride, h_column + columns, columns, RANK)
    out = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = out < width
    mask = live[:, None] & inside[None, :]
    gate_ptrs = gate_up_ptr + token[:, None] * gate_up_stride + out[None, :]
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + width, mask=mask, other=0.0).to(tl.float32)
    if basis_ptr is not None:  # noqa: SIM102 - the compiler decides this one, the device the next
        if tl.max(address, 0) >= 0:
            mixed_gate = mix_tile(h_gate, arena_ptr, address, rank, first, matrix, RANK, ALIGN)
            mixed_up = mix_tile(h_up, arena_ptr, address, rank, first, matrix + 1, RANK, ALIGN)
            gate = add_delta(
                gate, mixed_gate, basis_ptr, out, inside, columns, basis_stride, basis_rank_stride,
                RANK, FLOAT32_DOT,
            )  # fmt: skip
            up = add_delta(
                up, mixed_up, basis_ptr, out + width, inside, columns, basis_stride,
                basis_rank_stride, RANK, FLOAT32_DOT,
            )  # fmt: skip
    if bias_ptr is not None:
        gate += tl.load(bias_ptr + out, mask=inside, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias_ptr + width + out, mask=inside, other=0.0).to(tl.float32)[None, :]
    result = activate(gate, ACTIVATION) * up
    out_ptrs = out_ptr + token[:, None] * width + out[None, :]
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=mask)
