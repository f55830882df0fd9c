"""Compile the kernels for a GPU without having one: ``python -m shoal.kernels.compiling``.

The interpreter accepts programs the compiler refuses (a compile-time constant reassigned in a
branch, for one), so the tests run this on CPU machines. It needs Triton with its NVIDIA backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from shoal.kernels.add_rms_norm.jit import add_rms_norm_kernel
from shoal.kernels.core_apply.jit import core_apply_kernel, core_mix_kernel
from shoal.kernels.fold_sum.jit import fold_sum_kernel
from shoal.kernels.grouped_matmul.jit import grouped_matmul_kernel
from shoal.kernels.paged_attention.jit import (
    attention_decode_kernel,
    attention_prefill_kernel,
    attention_reduce_kernel,
)
from shoal.kernels.rope_kv.jit import rope_kv_kernel
from shoal.kernels.silu_mul.jit import silu_mul_kernel

H100 = GPUTarget("cuda", 90, 32)
INDEX_TYPES = {
    "addresses_ptr": "*i64",
    "ranks_ptr": "*i32",
    "starts_ptr": "*i32",
    "lengths_ptr": "*i32",
    "tables_ptr": "*i64",
    "contexts_ptr": "*i32",
    "partial_ptr": "*fp32",
    "weight_ptr": "*fp32",
    "delta_weight_ptr": "*fp32",
    "q_norm_ptr": "*fp32",
    "k_norm_ptr": "*fp32",
    "rotations_ptr": "*fp32",
    "firsts_ptr": "*i32",
    "positions_ptr": "*i64",
    "slots_ptr": "*i64",
}
SCALAR_TYPES = {"scale": "fp32", "softcap": "fp32", "eps": "fp32", "limit": "fp32"}
SHARED_BYTES = 227 << 10  # what one program may take on an H100

CORE = {"TILE": 16, "BLOCK_N": 128, "CHUNK": 16}
GROUPED = {"TILE": 16, "TILE_K": 64, "BLOCK_N": 16, "ALIGN": 16, "STAGES": 3, "FLOAT32_DOT": False}
PAGED = {"GROUP": 4, "HEAD_DIM": 128, "DIM": 128, "BLOCK_TOKENS": 16, "TILE": 64, "WINDOW": False}
PAGED |= {"SOFTCAP": False, "FLOAT32_DOT": False, "STAGES": 3, "num_stages": 3, "aligned": True}
DECODE = {**PAGED, "ROWS_M": 16, "num_warps": 4}
PREFILL = {**PAGED, "ROWS": 4, "ROWS_M": 128, "num_warps": 8}
FLOAT32 = {"FLOAT32_DOT": True, "STAGES": 2, "num_stages": 2}
# Kernels that apply adapters themselves: with all options, with the usual ones, and bare.
FUSED = {"RANK": 16, "ALIGN": 8, "FLOAT32_DOT": False, "basis_stride": 1, "columns": 16}
FUSED |= {"aligned": True, "h_column": 6144}
USUAL = {**FUSED, **dict.fromkeys(("firsts_ptr", "bias_ptr", "branch_ptr", "delta_weight_ptr"))}
USUAL |= {"q_norm_ptr": None, "k_norm_ptr": None}
CORE_POINTERS = ("arena_ptr", "addresses_ptr", "ranks_ptr", "firsts_ptr", "basis_ptr")
BARE = {**USUAL, **dict.fromkeys(CORE_POINTERS)}
NORM = {"n": 4096, "BLOCK": 4096, "ROWS": 1, "PLUS_ONE": False, "num_warps": 16}
SILU = {"width": 14336, "ACTIVATION": "silu", "TILE": 16, "BLOCK_N": 128}
ROPE = {"HEAD_DIM": 128, "HALF": 64, "HEADS": 1, "TILE": 16}
# Kernel, element type of its arrays, compile-time constants: every branch at least once.
VARIANTS: tuple[tuple[Any, str, Mapping[str, object]], ...] = (
    (core_apply_kernel, "*bf16", {**CORE, "RANK": 16, "ALIGN": 8, "FLOAT32_DOT": False}),
    (core_apply_kernel, "*fp32", {**CORE, "RANK": 16, "ALIGN": 1, "FLOAT32_DOT": True}),
    (core_mix_kernel, "*bf16", {"RANK": 64, "TILE": 4, "CHUNK": 16, "ALIGN": 8}),
    (fold_sum_kernel, "*bf16", {"RANK": 16, "FOLDS": 128, "EXACT": True}),
    (fold_sum_kernel, "*bf16", {"RANK": 64, "FOLDS": 32, "EXACT": False}),
    *(
        (
            grouped_matmul_kernel,
            "*bf16",
            {
                **GROUPED,
                "TRANSPOSED": transposed,
                "HAS_RANKS": ranks,
                "HAS_TILES": tiles,
                "SINGLE_K": single,
            },
        )
        for transposed, ranks, tiles, single in (
            (False, False, True, 16),
            (False, True, True, 0),
            (True, False, False, 256),
            (True, True, True, 256),
        )
    ),
    (attention_decode_kernel, "*bf16", DECODE),
    (attention_decode_kernel, "*bf16", {**DECODE, "BLOCK_TOKENS": 64, "WINDOW": True}),
    (attention_decode_kernel, "*fp16", {**DECODE, "HEAD_DIM": 96, "GROUP": 7, "SOFTCAP": True}),
    (attention_decode_kernel, "*bf16", {**DECODE, "HEAD_DIM": 256, "DIM": 256, "TILE": 32}),
    (attention_decode_kernel, "*fp32", {**DECODE, **FLOAT32, "TILE": 32, "STAGES": 3}),
    (attention_reduce_kernel, "*bf16", {**PAGED, "SPLITS": 64}),
    (attention_prefill_kernel, "*bf16", PREFILL),
    (attention_prefill_kernel, "*bf16", {**PREFILL, "BLOCK_TOKENS": 64, "WINDOW": True}),
    (attention_prefill_kernel, "*fp16", {**PREFILL, "HEAD_DIM": 96, "GROUP": 7, "SOFTCAP": True}),
    (
        attention_prefill_kernel,
        "*bf16",
        {**PREFILL, "HEAD_DIM": 256, "DIM": 256, "STAGES": 2, "num_stages": 2},
    ),
    (
        attention_prefill_kernel,
        "*fp32",
        {**PREFILL, **FLOAT32, "HEAD_DIM": 64, "DIM": 64, "ROWS_M": 32, "TILE": 32, "num_warps": 4},
    ),
    (add_rms_norm_kernel, "*fp16", {**FUSED, **NORM, "ROWS": 2, "PLUS_ONE": True}),
    (add_rms_norm_kernel, "*bf16", {**USUAL, **NORM, "RANK": 32, "columns": 32}),
    (add_rms_norm_kernel, "*bf16", {**BARE, **NORM, "num_warps": 8}),
    (silu_mul_kernel, "*fp16", {**FUSED, **SILU, "ACTIVATION": "gelu_tanh"}),
    (silu_mul_kernel, "*bf16", {**USUAL, **SILU, "wide": True}),
    (silu_mul_kernel, "*bf16", {**BARE, **SILU, "ACTIVATION": "gelu", "TILE": 1}),
    (rope_kv_kernel, "*fp16", {**FUSED, **ROPE, "num_warps": 8}),
    (rope_kv_kernel, "*bf16", {**USUAL, **ROPE, "wide": True}),
    (rope_kv_kernel, "*bf16", {**BARE, **ROPE, "TILE": 4, "HEAD_DIM": 96}),
)


def compile_variant(kernel: object, element: str, constants: Mapping[str, object]) -> int:
    """Compile one variant for an H100; returns the size of its machine code in bytes.

    Args:
        element: type of the arrays that ``INDEX_TYPES`` does not name.
        constants: compile-time constants; those the kernel has no argument for are left out, but
            for ``num_warps``, ``num_stages`` and ``aligned`` (pointers and strides are multiples
            of 16, as they are in use: without it no load is wide enough to be pipelined), and
            ``wide`` (no element may be loaded alone: that is how a lost alignment shows).
    """
    signature: dict[str, str] = {}
    attributes = {}
    for i, name in enumerate(kernel.arg_names):  # type: ignore[attr-defined]
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = name.endswith("_ptr")
        types = INDEX_TYPES if pointer else SCALAR_TYPES
        signature[name] = types.get(name, element if pointer else "i32")
        if constants.get("aligned") and (pointer or name.endswith("_stride")):
            attributes[(i,)] = [["tt.divisibility", 16]]
    used = {name: value for name, value in constants.items() if name in signature}
    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=used, attrs=attributes)
    compiled = compile(source, target=H100, options=options)
    assert compiled.metadata.shared <= SHARED_BYTES, f"{compiled.metadata.shared} bytes shared"
    narrow = constants.get("wide") and "ld.global.b16" in compiled.asm["ptx"]
    assert not narrow, "an element is loaded alone"
    return len(compiled.asm["cubin"])


def main() -> None:
    """Compile every variant and print its size."""
    for kernel, element, constants in VARIANTS:
        size = compile_variant(kernel, element, constants)
        print(f"{kernel.__name__} {element} {constants}: {size} bytes")


if __name__ == "__main__":
    main()
