"""``add_residual``: the residual stream kept un-normalised, and the sums its RMS norm will need.

The norm multiplies a row by one number, so it can be applied behind the GEMM that reads the row
(``RowScale``). What is left here needs no whole row: tiles of tokens x columns, and of the basis
only a tile's columns.

Owns argument checks, dispatch and launch shapes. Dispatch goes by device alone: CPU tensors run
the reference, GPU tensors the Triton kernel. ``launch_add_residual`` always launches; on CPU
tensors that needs Triton's interpreter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.kernels.add_residual.reference import add_residual_reference
from shoal.kernels.core_apply.epilogue import (
    PROMPT_TOKENS,
    Epilogue,
    check_epilogue,
    default_tile,
    epilogue_arguments,
)
from shoal.kernels.errors import ShapeError, check_matrix, check_vector
from shoal.kernels.launching import (
    FLOATS,
    TileConfig,
    overlap_options,
    power_of_two,
    require_triton,
)

PARTS = 16  # at most, from 256 columns a part on


def part_columns(n: int) -> int:
    """How many columns of a residual of ``n`` one part of ``sums`` covers, or half as many."""
    return max(256, power_of_two(-(-n // PARTS)))


def add_residual(
    residual: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    core: Epilogue | None = None,
    out: Tensor | None = None,
    sums: Tensor | None = None,
    early: bool = True,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """``residual += delta + δ + bias``; then ``x = residual · weight``, and its sums of squares.

    x is what the next GEMM reads. The RMS norm's factor of a row is
    ``rsqrt(sums.sum(0) / n + eps)``: whatever follows that GEMM multiplies by it (``RowScale``).

    Args:
        residual: ``(tokens, n)``, in and out. Rows may be strided.
        delta: ``(tokens, n or more)``, a GEMM's output; columns beyond n are read by ``core``
            only. None: nothing is added (the start of a model).
        weight: ``(n,)`` of the norm.
        bias: ``(n,)``, added after the deltas.
        core: the adapters of the GEMM, or None when no token of the step has one.
        out: ``(tokens, n)``, contiguous; where x goes. Default: made, in residual's dtype.
        sums: ``(parts, tokens)`` float32, contiguous, of ``default_config``'s parts; default: made.
        early: see ``launching.overlap_options``; False where the call before writes the tables.
        config: launch parameters, for measurements; its ``block_n`` is a part's columns.

    Floats are float32, float16 or bfloat16, each its own; the arithmetic is float32. Squares and x
    are those of residual as it is stored, after rounding. (Without the norm's factor x is as large
    as residual: too large for float16 in some models.)

    Returns:
        x ``(tokens, n)`` and sums ``(parts, tokens)``: of the squares of each part's columns.

    Raises:
        ShapeError: a shape, dtype, stride or device is wrong (names the argument).
        TritonMissing: the tensors are on a GPU and Triton is not installed.

    Cost: reads ``2·tokens·n`` and writes as much; the adapters add ``tokens·columns +
    Σ_distinct r²`` for every part, and ``n·columns`` for every tile of tokens, mostly from the L2
    cache. Memory bound.
    """
    _check(residual, delta, weight, bias, core)
    config = config or default_config(residual.shape[0], residual.shape[1], core)
    out, sums = _outputs(residual, out, sums, config.block_n)
    if residual.device.type == "cpu":
        x, squares = add_residual_reference(residual, delta, weight, bias, core, config.block_n)
        out.copy_(x)
        sums.copy_(squares)
    else:
        _launch(residual, delta, weight, bias, core, out, sums, early, config)
    return out, sums


def launch_add_residual(
    residual: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    core: Epilogue | None = None,
    out: Tensor | None = None,
    sums: Tensor | None = None,
    early: bool = True,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """``add_residual`` through Triton on any device; CPU tensors need ``TRITON_INTERPRET=1``."""
    _check(residual, delta, weight, bias, core)
    config = config or default_config(residual.shape[0], residual.shape[1], core)
    out, sums = _outputs(residual, out, sums, config.block_n)
    _launch(residual, delta, weight, bias, core, out, sums, early, config)
    return out, sums


def default_config(tokens: int, n: int, core: Epilogue | None) -> TileConfig:
    """The launch parameters; ``block_n`` is the columns of a part of the sums."""
    part = part_columns(n)
    if core is None:
        return TileConfig(4 if tokens <= 512 else 16, part, 4)
    if tokens <= PROMPT_TOKENS:
        # Swept inside a captured decode step of Llama-3.1-8B (H100, rank 16).
        return TileConfig(16, part // 2 if tokens <= 64 else part, 8)
    chosen = default_tile(core, tokens)
    tile = max(16, chosen.tile * chosen.block_n // part)
    return TileConfig(tile, part, chosen.num_warps)


def _check(
    residual: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    core: Epilogue | None,
) -> None:
    check_matrix("residual", residual, FLOATS)
    tokens, n = residual.shape
    if n < 1:
        raise ShapeError("residual", "at least 1 column", n)
    device = residual.device
    check_vector("weight", weight, FLOATS, n)
    if weight.device != device:
        raise ShapeError("weight", "the device of residual", weight.device)
    if delta is None:
        if bias is not None or core is not None:
            name = "core" if bias is None else "bias"
            raise ShapeError(name, "None without delta", "a value")
        return
    check_matrix("delta", delta, FLOATS)
    if delta.shape[0] != tokens or delta.shape[1] < n:
        raise ShapeError("delta", f"shape ({tokens}, {n} or more)", tuple(delta.shape))
    if delta.device != device:
        raise ShapeError("delta", "the device of residual", delta.device)
    if bias is not None:
        check_vector("bias", bias, FLOATS, n)
        if bias.device != device:
            raise ShapeError("bias", "the device of residual", bias.device)
    if core is not None:
        check_epilogue(core, "delta", delta, (n,))


def _outputs(
    residual: Tensor, out: Tensor | None, sums: Tensor | None, part: int
) -> tuple[Tensor, Tensor]:
    """``out`` and ``sums``, checked or made."""
    tokens, n = residual.shape
    device = residual.device
    if out is None:
        out = torch.empty((tokens, n), dtype=residual.dtype, device=device)
    elif out.shape != residual.shape or not out.is_contiguous() or out.device != device:
        raise ShapeError("out", f"contiguous, of shape {(tokens, n)}", tuple(out.shape))
    shape = (-(-n // part), tokens)
    if sums is None:
        sums = torch.empty(shape, dtype=torch.float32, device=device)
    elif sums.shape != shape or not sums.is_contiguous() or sums.device != device:
        raise ShapeError("sums", f"contiguous, of shape {shape}", tuple(sums.shape))
    if out.dtype not in FLOATS or sums.dtype != torch.float32:
        raise ShapeError("sums", "float32 beside a float out", (out.dtype, sums.dtype))
    return out, sums


def _launch(
    residual: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    core: Epilogue | None,
    out: Tensor,
    sums: Tensor,
    early: bool,
    config: TileConfig,
) -> None:
    require_triton()
    from shoal.kernels.add_residual.jit import add_residual_kernel

    tokens, n = residual.shape
    if tokens == 0:
        return
    add_residual_kernel[(-(-tokens // config.tile), sums.shape[0])](
        residual_ptr=residual,
        delta_ptr=delta,
        bias_ptr=bias,
        weight_ptr=weight,
        out_ptr=out,
        sums_ptr=sums,
        tokens=tokens,
        n=n,
        residual_stride=residual.stride(0),
        delta_stride=0 if delta is None else delta.stride(0),
        **epilogue_arguments(core),
        TILE=config.tile,
        BLOCK_N=config.block_n,
        **overlap_options(residual.device, early),
        num_warps=config.num_warps,
    )
