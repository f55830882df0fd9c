"""Compile the kernels for a GPU without having one: ``python -m shoal.kernels.compiling``.

The interpreter accepts programs the compiler refuses (a compile-time constant reassigned in a
branch, for one), so the tests run this on CPU machines. It needs Triton with its NVIDIA backend.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, compile

from shoal.kernels.add_residual.jit import add_residual_kernel
from shoal.kernels.add_rms_norm.jit import add_rms_norm_kernel
from shoal.kernels.core_apply.jit import core_apply_kernel, core_mix_kernel
from shoal.kernels.core_project.jit import core_mix_rows_kernel, core_project_kernel
from shoal.kernels.fold_sum.jit import fold_sum_kernel
from shoal.kernels.grouped_matmul.jit import expand_kernel, shrink_kernel
from shoal.kernels.lane_matmul.jit import lane_matmul_kernel
from shoal.kernels.lane_outer.jit import lane_outer_kernel, lane_sum_kernel
from shoal.kernels.paged_attention.jit import (
    attention_decode_kernel,
    attention_prefill_kernel,
    attention_reduce_kernel,
)
from shoal.kernels.rope_kv.jit import rope_kv_kernel
from shoal.kernels.sample_tokens.jit import sample_pick_kernel, sample_scan_kernel
from shoal.kernels.scale_outputs.jit import scale_outputs_kernel
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
    "mixed_ptr": "*fp32",
    "sums_ptr": "*fp32",
    "temperature_ptr": "*fp32",
    "top_k_ptr": "*i32",
    "top_p_ptr": "*fp32",
    "min_p_ptr": "*fp32",
    "uniform_ptr": "*fp64",
    "scale_ptr": "*fp32",
    "best_ptr": "*fp32",
    "index_ptr": "*i32",
    "chunk_max_ptr": "*fp32",
    "chunk_sum_ptr": "*fp32",
    "tokens_ptr": "*i64",
    "owners_ptr": "*i32",
    "counts_ptr": "*i32",
    "lanes_ptr": "*i32",
    "bank_ptr": "*fp32",
    "grads_ptr": "*fp32",
}
SCALAR_TYPES = {"scale": "fp32", "softcap": "fp32", "eps": "fp32", "limit": "fp32"}
SCALAR_TYPES |= {"sums_width": "fp32", "sums_eps": "fp32"}
EVEN = ("k", "n", "width", "width0", "width1", "width2")  # widths of a model's linears
OPTIONS = ("num_warps", "num_stages", "maxnreg")
SHARED_BYTES = 227 << 10  # what one program may take on an H100

CORE = {"TILE": 16, "BLOCK_N": 128, "CHUNK": 16}
FOLD = {"num_warps": 16, "aligned": True}
TILES = {"TILE": 16, "TILE_N": 16, "ALIGN": 16, "STAGES": 3, "FLOAT32_DOT": False, "aligned": True}
SHRINK = {
    **TILES,
    "SINGLE_N": 4,
    "TILE_K": 128,
    "num_stages": 3,
    "SINGLE_K": 512,
    "num_warps": 4,
}
SHRINK |= {"unspilled": True, "wide": True}
EXPAND = {
    **TILES,
    "TILE_K": 16,
    "BLOCK_N": 512,
    "SINGLE": True,
    "num_warps": 2,
    "num_stages": 1,
    "PDL": True,
}
EXPAND |= {"unspilled": True}
PAGED = {"GROUP": 4, "HEAD_DIM": 128, "DIM": 128, "BLOCK_TOKENS": 16, "TILE": 64, "WINDOW": False}
PAGED |= {"SOFTCAP": False, "FLOAT32_DOT": False, "STAGES": 3, "num_stages": 3, "aligned": True}
DECODE = {**PAGED, "ROWS_M": 16, "num_warps": 4}
PREFILL = {**PAGED, "ROWS": 256, "ROWS_M": 128, "num_warps": 8}
FLOAT32 = {"FLOAT32_DOT": True, "STAGES": 2, "num_stages": 2}
# Kernels that apply adapters themselves: with all options; with the usual ones, inline at 16 and
# 32 columns, and with u already made; and bare.
FUSED: dict[str, object] = {"RANK": 16, "ALIGN": 8, "SPLITS": 1, "PARTS": 16, "PDL": True}
FUSED |= {"FLOAT32_DOT": False, "TILE": 16, "mixed_ptr": None, "h_column": 6144, "aligned": True}
EXTRAS = ("bias_ptr", "branch_ptr", "delta_weight_ptr", "q_norm_ptr", "k_norm_ptr")
USUAL = {**FUSED, **dict.fromkeys(EXTRAS), "wide": True, "unspilled": True}
WIDER = {**USUAL, "RANK": 32, "num_warps": 8}
ROW_POINTERS = ("arena_ptr", "addresses_ptr", "ranks_ptr", "firsts_ptr")
MADE = {**USUAL, **dict.fromkeys(ROW_POINTERS), "RANK": 64, "SPLITS": 2, "num_warps": 8}
MADE.pop("mixed_ptr")
BARE = {**USUAL, **dict.fromkeys((*ROW_POINTERS, "basis_ptr")), "PDL": False}
FUSED_FLOAT32 = {**FUSED, "FLOAT32_DOT": True, "ALIGN": 1}
RESIDUAL = {"n": 4096, "BLOCK_N": 256}
START = {**RESIDUAL, "delta_ptr": None, "TILE": 4, "PDL": True}
NORM = {"n": 4096, "BLOCK": 4096, "PLUS_ONE": False, "PDL": True, "num_warps": 8, "aligned": True}
SILU = {"width": 14336, "ACTIVATION": "silu", "BLOCK_N": 256}
ROPE = {"HEAD_DIM": 128, "HALF": 64, "HEADS": 2}
PROJECT = {"RANK": 16, "ALIGN": 8, "MODULES": 2, "WIDTH": 32, "TILE": 64, "BLOCK_K": 128}
PROJECT |= {"STEPS": 32, "ROWS": 16, "num_warps": 8, "num_stages": 4}
PROJECT |= {"FLOAT32_DOT": False, "PDL": True, "k": 4096, "aligned": True, "unspilled": True}
PROJECT_64 = {"RANK": 64, "WIDTH": 128, "TILE": 16, "num_stages": 3}
MIX = {key: value for key, value in PROJECT.items() if key not in ("WIDTH", "ROWS")}
MIX |= {"TILE": 4, "h_column": 6144, "num_warps": 1}
SCALE = {"ALIGN": 16, "BLOCK_N": 1024, "num_warps": 4, "aligned": True, "unspilled": True}
LANE_MATMUL: dict[str, object] = {
    "TILE": 64,
    "BLOCK_K": 16,
    "BLOCK_N": 16,
    "ADD": False,
    "PRECISION": "tf32",
}
LANE_MATMUL |= {"num_warps": 4, "aligned": True, "unspilled": True}
LANE_OUTER: dict[str, object] = {
    "TILE": 64,
    "BLOCK_M": 16,
    "BLOCK_N": 16,
    "SPLITS": 1,
    "UPCAST": False,
}
MIXED: dict[str, object] = {"BLOCK_N": 128, "UPCAST": True, "PRECISION": "tf32"}
LANE_OUTER |= {"PRECISION": "ieee", "num_warps": 4, "aligned": True, "unspilled": True}
# With scale and softcap; FIRM has neither.
SAMPLE: dict[str, object] = {"vocab": 128256, "CHUNK": 2048, "CHUNKS": 64, "BLOCK": 4096}
SAMPLE |= {"GROUP": 8192, "GROUPS": 16, "GREEDY_ONLY": False, "SOFTCAP": True, "SHIFT": 16}
SAMPLE |= {"aligned": True}
FIRM = {**SAMPLE, "SOFTCAP": False, "scale_ptr": None, "wide": True}
GREEDY = {**FIRM, "GREEDY_ONLY": True}
PICK = {"num_warps": 16, "maxnreg": 64}
# Kernel, element type of its arrays, compile-time constants: every branch at least once.
VARIANTS: tuple[tuple[Any, str, Mapping[str, object]], ...] = (
    (core_apply_kernel, "*bf16", {**CORE, "RANK": 16, "ALIGN": 8, "FLOAT32_DOT": False}),
    (core_apply_kernel, "*fp32", {**CORE, "RANK": 16, "ALIGN": 1, "FLOAT32_DOT": True}),
    (core_mix_kernel, "*bf16", {"RANK": 64, "TILE": 4, "CHUNK": 16, "ALIGN": 8}),
    (fold_sum_kernel, "*bf16", {**FOLD, "RANK": 16, "FOLDS": 128, "HALVINGS": 4}),
    (fold_sum_kernel, "*bf16", {**FOLD, "RANK": 64, "FOLDS": 32, "HALVINGS": 6, "num_warps": 2}),
    (shrink_kernel, "*bf16", SHRINK),
    (shrink_kernel, "*bf16", {**SHRINK, "SINGLE_N": 1, "SINGLE_K": 1024, "STAGES": 4}),
    (shrink_kernel, "*bf16", {**SHRINK, "TILE_N": 32, "SINGLE_N": 32, "SINGLE_K": 0}),
    (shrink_kernel, "*fp32", {**SHRINK, "FLOAT32_DOT": True, "ALIGN": 1}),
    (expand_kernel, "*bf16", EXPAND),
    (expand_kernel, "*bf16", {**EXPAND, "SINGLE": False, "unspilled": False}),
    (expand_kernel, "*fp32", {**EXPAND, "FLOAT32_DOT": True, "BLOCK_N": 128, "num_warps": 4}),
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
    (add_rms_norm_kernel, "*fp16", {**NORM, "PLUS_ONE": True}),
    (add_rms_norm_kernel, "*bf16", {**NORM, **dict.fromkeys(EXTRAS), "PDL": False}),
    (add_residual_kernel, "*fp32", {**FUSED_FLOAT32, **RESIDUAL}),
    (add_residual_kernel, "*bf16", {**USUAL, **RESIDUAL}),
    (add_residual_kernel, "*bf16", {**WIDER, **RESIDUAL}),
    (add_residual_kernel, "*bf16", {**MADE, **RESIDUAL}),
    (add_residual_kernel, "*bf16", {**BARE, **START}),
    (silu_mul_kernel, "*fp16", {**FUSED, **SILU, "ACTIVATION": "gelu_tanh"}),
    (silu_mul_kernel, "*bf16", {**USUAL, **SILU}),
    (silu_mul_kernel, "*bf16", {**WIDER, **SILU}),
    (silu_mul_kernel, "*bf16", {**MADE, **SILU, "TILE": 64, "BLOCK_N": 64, "num_warps": 4}),
    (silu_mul_kernel, "*bf16", {**BARE, **SILU, "ACTIVATION": "gelu", "TILE": 1}),
    (rope_kv_kernel, "*fp16", {**FUSED, **ROPE, "num_warps": 8}),
    (rope_kv_kernel, "*bf16", {**USUAL, **ROPE}),
    (rope_kv_kernel, "*bf16", {**WIDER, **ROPE}),
    (rope_kv_kernel, "*bf16", {**MADE, **ROPE}),
    (rope_kv_kernel, "*bf16", {**BARE, **ROPE, "TILE": 4, "HEAD_DIM": 96}),
    (core_project_kernel, "*bf16", {**PROJECT, "wide": True}),
    (core_project_kernel, "*bf16", {**PROJECT, "TILE": 128, "ROWS": 8, "wide": True}),
    (core_project_kernel, "*bf16", {**PROJECT, "TILE": 128, "ROWS": 4, "RANK": 32, "WIDTH": 64}),
    (core_project_kernel, "*bf16", {**PROJECT, **PROJECT_64}),
    (core_project_kernel, "*fp32", {**PROJECT, "FLOAT32_DOT": True, "ALIGN": 1, "TILE": 16}),
    (core_mix_rows_kernel, "*bf16", MIX),
    (core_mix_rows_kernel, "*bf16", {**MIX, "RANK": 64, "num_warps": 4}),
    (
        scale_outputs_kernel,
        "*bf16",
        {**SCALE, "wide": True},
    ),
    (scale_outputs_kernel, "*fp32", {**SCALE, "ALIGN": 1, "aligned": False}),
    (lane_matmul_kernel, "*bf16", LANE_MATMUL),
    (lane_matmul_kernel, "*bf16", {**LANE_MATMUL, "BLOCK_N": 128, "ADD": True}),
    (lane_matmul_kernel, "*bf16", {**LANE_MATMUL, "BLOCK_K": 64, "BLOCK_N": 64}),
    (lane_matmul_kernel, "*fp32", {**LANE_MATMUL, "PRECISION": "ieee"}),
    (lane_outer_kernel, "*bf16", LANE_OUTER),
    (lane_outer_kernel, "*bf16", {**LANE_OUTER, "BLOCK_M": 64, "BLOCK_N": 64, "SPLITS": 4}),
    (
        lane_outer_kernel,
        "*bf16",
        {**LANE_OUTER, **MIXED},
    ),
    (lane_outer_kernel, "*fp32", {**LANE_OUTER, "UPCAST": True}),
    (lane_sum_kernel, "*fp32", {"SPLITS": 4, "BLOCK": 256, "num_warps": 4}),
    *(
        (sample_scan_kernel, element, {**constants, "num_warps": 4, "unspilled": True})
        for element, constants in (("*bf16", GREEDY), ("*bf16", FIRM), ("*fp32", SAMPLE))
    ),
    (sample_pick_kernel, "*bf16", {**GREEDY, **PICK, "num_warps": 1}),
    (sample_pick_kernel, "*bf16", {**FIRM, **PICK}),
    (sample_pick_kernel, "*fp16", {**SAMPLE, **PICK, "SHIFT": 13}),
    (sample_pick_kernel, "*fp32", {**SAMPLE, **PICK, "SHIFT": 0}),
)


def compile_variant(kernel: object, element: str, constants: Mapping[str, object]) -> int:
    """Compile one variant for an H100; returns the size of its machine code in bytes.

    Args:
        element: type of the arrays that ``INDEX_TYPES`` does not name.
        constants: compile-time constants; those the kernel has no argument for are left out, but
            for the launch ``OPTIONS`` and ``aligned`` (pointers, strides and ``EVEN`` are multiples
            of 16, as they are in use: without it no load is wide enough to be pipelined), and
            ``wide`` (no element may be loaded alone: that is how a lost alignment shows), and
            ``unspilled`` (no register may go to memory). With PDL nothing may be stored before
            the wait, and addresses must be asked for before it.
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
        even = pointer or name.endswith("_stride") or name in EVEN
        if constants.get("aligned") and even:
            attributes[(i,)] = [["tt.divisibility", 16]]
    used = {name: value for name, value in constants.items() if name in signature}
    options = {name: constants[name] for name in OPTIONS if name in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=used, attrs=attributes)
    compiled = compile(source, target=H100, options=options)
    assert compiled.metadata.shared <= SHARED_BYTES, f"{compiled.metadata.shared} bytes shared"
    narrow = constants.get("wide") and "ld.global.b16" in compiled.asm["ptx"]
    assert not narrow, "an element is loaded alone"
    if constants.get("PDL"):
        early, wait, _ = compiled.asm["ptx"].partition("griddepcontrol.wait")
        assert wait, "it never waits"
        assert "st.global" not in early, "a store comes before the wait"
        inline = signature.get("arena_ptr", "constexpr") != "constexpr"
        assert "ld.global" in early or not inline, "addresses are loaded after the wait"
    if constants.get("unspilled"):
        assert (spilled := _spilled(compiled.asm["ptx"])) == 0, f"{spilled} bytes spilled"
    return len(compiled.asm["cubin"])


def _spilled(ptx: str) -> int:
    """Bytes of registers that a thread stores to memory, says the assembler."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        command = [get_ptxas(H100.arch).path, "-v", "--gpu-name=sm_90a", source.name]
        done = subprocess.run(
            [*command, "-o", os.devnull], capture_output=True, text=True, check=True
        )
    found = re.search(r"(\d+) bytes spill stores", done.stderr)
    assert found, done.stderr
    return int(found.group(1))


def main() -> None:
    """Compile every variant and print its size."""
    for kernel, element, constants in VARIANTS:
        size = compile_variant(kernel, element, constants)
        print(f"{kernel.__name__} {element} {constants}: {size} bytes")


if __name__ == "__main__":
    main()
