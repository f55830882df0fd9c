"""Compile the kernels for a GPU without having one: ``python -m shoal.kernels.compiling``.

The interpreter accepts programs the compiler refuses (a compile-time constant reassigned in a
branch, for one), so the tests run this on CPU machines. It needs Triton with its NVIDIA backend.
"""

from __future__ import annotations

from collections.abc import Mapping

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from shoal.kernels.core_apply.jit import core_apply_kernel, core_mix_kernel
from shoal.kernels.fold_sum.jit import fold_sum_kernel
from shoal.kernels.grouped_matmul.jit import grouped_matmul_kernel

H100 = GPUTarget("cuda", 90, 32)
INDEX_TYPES = {
    "addresses_ptr": "*i64",
    "ranks_ptr": "*i32",
    "starts_ptr": "*i32",
    "lengths_ptr": "*i32",
}

CORE = {"TILE": 16, "BLOCK_N": 128, "CHUNK": 16}
GROUPED = {"TILE": 16, "TILE_K": 64, "BLOCK_N": 16, "ALIGN": 16, "STAGES": 3, "FLOAT32_DOT": False}
# Kernel, element type of its arrays, compile-time constants: every branch at least once.
VARIANTS = (
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
)


def compile_variant(kernel: object, element: str, constants: Mapping[str, object]) -> int:
    """Compile one variant for an H100; returns the size of its machine code in bytes."""
    signature = {}
    for name in kernel.arg_names:  # type: ignore[attr-defined]
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = INDEX_TYPES.get(name, element)
        else:
            signature[name] = "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants))
    return len(compile(source, target=H100).asm["cubin"])


def main() -> None:
    """Compile every variant and print its size."""
    for kernel, element, constants in VARIANTS:
        size = compile_variant(kernel, element, constants)
        print(f"{kernel.__name__} {element} {constants}: {size} bytes")


if __name__ == "__main__":
    main()
