"""``silu_mul``: the gated activation of the MLP, with the LoRA-XS deltas of gate and up.

Owns argument checks, dispatch and launch shapes. Dispatch goes by device alone: CPU tensors run
the reference, GPU tensors the Triton kernel. ``launch_silu_mul`` always launches; on CPU tensors
that needs Triton's interpreter.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from shoal.kernels.core_apply.epilogue import (
    PROMPT_TOKENS,
    Epilogue,
    MixedEpilogue,
    RowScale,
    check_epilogue,
    check_scale,
    default_tile,
    epilogue_arguments,
    scale_arguments,
)
from shoal.kernels.errors import ShapeError, check_matrix, check_vector
from shoal.kernels.launching import FLOATS, TileConfig, overlap_options, require_triton
from shoal.kernels.silu_mul.reference import Activation, silu_mul_reference

ACTIVATIONS = get_args(Activation)


def silu_mul(
    gate_up: Tensor,
    width: int,
    *,
    activation: Activation = "silu",
    bias: Tensor | None = None,
    core: Epilogue | None = None,
    scale: RowScale | None = None,
    early: bool = True,
    config: TileConfig | None = None,
) -> Tensor:
    """``act((gate + δ_gate)·f + bias_gate) · ((up + δ_up)·f + bias_up)``, f the row's factor.

    Args:
        gate_up: ``(tokens, 2·width or more)``: gate, up, and whatever the GEMM was widened by,
            which only ``core`` reads. Rows may be strided.
        width: of gate and of up.
        activation: ``silu``, ``gelu_tanh`` or (exact) ``gelu``.
        bias: ``(2·width,)``, added after the deltas and the factor.
        core: the adapters of gate and up, or None when no token of the step has one.
        scale: the factor of each row (a deferred norm), or None: 1.
        early: see ``launching.overlap_options``; False where the call before writes the tables.
        config: launch parameters, for measurements.

    Floats are float32, float16 or bfloat16, each its own; the arithmetic is float32.

    Returns:
        ``(tokens, width)`` in gate_up's dtype, newly allocated.

    Raises:
        ShapeError: a shape, dtype, stride or device is wrong (names the argument).
        TritonMissing: the tensors are on a GPU and Triton is not installed.

    Cost: reads ``2·tokens·width`` and writes ``tokens·width`` elements; the adapters add
    ``tokens·2·columns + Σ_distinct 2·r² + 2·width·columns`` read. Memory bound.
    """
    _check(gate_up, width, activation, bias, core, scale)
    if gate_up.device.type == "cpu":
        return silu_mul_reference(gate_up, width, activation, bias, core, scale)
    return _launch(gate_up, width, activation, bias, core, scale, early, config)


def launch_silu_mul(
    gate_up: Tensor,
    width: int,
    *,
    activation: Activation = "silu",
    bias: Tensor | None = None,
    core: Epilogue | None = None,
    scale: RowScale | None = None,
    early: bool = True,
    config: TileConfig | None = None,
) -> Tensor:
    """``silu_mul`` through Triton on any device; CPU tensors need ``TRITON_INTERPRET=1``."""
    _check(gate_up, width, activation, bias, core, scale)
    return _launch(gate_up, width, activation, bias, core, scale, early, config)


def default_config(core: Epilogue | None, tokens: int) -> TileConfig:
    """The launch parameters, with or without adapters."""
    if core is None:  # one contiguous run of 16 bytes per thread
        return TileConfig(1, 1024, 4)
    # Swept inside a captured decode step of Llama-3.1-8B (H100, 16 and 32 columns).
    if isinstance(core, MixedEpilogue):
        if tokens <= 64:
            return TileConfig(16, 64, 4)
        if core.mixed.shape[-1] > 16:
            return TileConfig(64, 64, 4)
        if tokens <= 160:
            return TileConfig(16, 128, 4)
    if tokens <= PROMPT_TOKENS:
        return TileConfig(16, 256, 8)
    return default_tile(core, tokens)


def _check(
    gate_up: Tensor,
    width: int,
    activation: str,
    bias: Tensor | None,
    core: Epilogue | None,
    scale: RowScale | None,
) -> None:
    check_matrix("gate_up", gate_up, FLOATS)
    if not 1 <= 2 * width <= gate_up.shape[1]:
        raise ShapeError("width", f"1 to half of gate_up's {gate_up.shape[1]} columns", width)
    if activation not in ACTIVATIONS:
        raise ShapeError("activation", f"one of {ACTIVATIONS}", activation)
    if bias is not None:
        check_vector("bias", bias, FLOATS, 2 * width)
        if bias.device != gate_up.device:
            raise ShapeError("bias", "the device of gate_up", bias.device)
    if core is not None:
        check_epilogue(core, "gate_up", gate_up, (width, width))
    if scale is not None:
        check_scale(scale, "gate_up", gate_up)


def _launch(
    gate_up: Tensor,
    width: int,
    activation: str,
    bias: Tensor | None,
    core: Epilogue | None,
    scale: RowScale | None,
    early: bool,
    config: TileConfig | None,
) -> Tensor:
    require_triton()
    from shoal.kernels.silu_mul.jit import silu_mul_kernel

    tokens = gate_up.shape[0]
    out = torch.empty((tokens, width), dtype=gate_up.dtype, device=gate_up.device)
    if tokens == 0:
        return out
    chosen = config or default_config(core, tokens)
    grid = (-(-tokens // chosen.tile), -(-width // chosen.block_n))
    silu_mul_kernel[grid](
        gate_up_ptr=gate_up,
        bias_ptr=bias,
        out_ptr=out,
        tokens=tokens,
        width=width,
        gate_up_stride=gate_up.stride(0),
        **epilogue_arguments(core),
        **scale_arguments(scale),
        ACTIVATION=activation,
        TILE=chosen.tile,
        BLOCK_N=chosen.block_n,
        **overlap_options(gate_up.device, early),
        num_warps=chosen.num_warps,
    )
    return out
