"""``silu_mul``: the gated activation of the MLP, with the LoRA-XS deltas of gate and up.

Owns argument checks, dispatch and launch shapes. Dispatch goes by device alone: CPU tensors run
the reference, GPU tensors the Triton kernel. ``launch_silu_mul`` always launches; on CPU tensors
that needs Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from shoal.kernels.core_apply.epilogue import (
    CoreEpilogue,
    check_epilogue,
    epilogue_arguments,
    epilogue_dot_in_float32,
)
from shoal.kernels.errors import ShapeError, check_devices, check_matrix, check_vector
from shoal.kernels.launching import FLOATS, require_triton
from shoal.kernels.silu_mul.reference import Activation, silu_mul_reference


@dataclass(frozen=True, slots=True)
class SiluConfig:
    """How to launch: tokens and outputs per program. With adapters ``tile`` is at least 16."""

    tile: int = 16
    block_n: int = 256
    num_warps: int = 4


def silu_mul(
    gate_up: Tensor,
    width: int,
    *,
    activation: Activation = "silu",
    bias: Tensor | None = None,
    core: CoreEpilogue | None = None,
    config: SiluConfig | None = None,
) -> Tensor:
    """``act(gate + δ_gate + bias_gate) · (up + δ_up + bias_up)``.

    Args:
        gate_up: ``(tokens, 2·width or more)``: gate, up, and whatever the GEMM was widened by,
            which only ``core`` reads. Rows may be strided.
        width: of gate and of up.
        activation: ``silu``, ``gelu_tanh`` or (exact) ``gelu``.
        bias: ``(2·width,)``, added after the deltas.
        core: the adapters of gate and up, or None when no token of the step has one.
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
    _check(gate_up, width, activation, bias, core)
    if gate_up.device.type == "cpu":
        return silu_mul_reference(gate_up, width, activation, bias, core)
    return _launch(gate_up, width, activation, bias, core, config)


def launch_silu_mul(
    gate_up: Tensor,
    width: int,
    *,
    activation: Activation = "silu",
    bias: Tensor | None = None,
    core: CoreEpilogue | None = None,
    config: SiluConfig | None = None,
) -> Tensor:
    """``silu_mul`` through Triton on any device; CPU tensors need ``TRITON_INTERPRET=1``."""
    _check(gate_up, width, activation, bias, core)
    return _launch(gate_up, width, activation, bias, core, config)


def default_config(core: CoreEpilogue | None) -> SiluConfig:
    """The launch parameters, with or without adapters."""
    # Not swept yet. With adapters: what core_apply measured (256 to 512 outputs per program; here
    # gate and up make two of them), more warps where R of rank 32 has to fit their registers.
    # Without: one contiguous run of 16 bytes per thread.
    if core is None:
        return SiluConfig(tile=1, block_n=1024)
    return SiluConfig(num_warps=4 if core.basis.shape[1] <= 16 else 8)


def _check(
    gate_up: Tensor,
    width: int,
    activation: str,
    bias: Tensor | None,
    core: CoreEpilogue | None,
) -> None:
    check_matrix("gate_up", gate_up, FLOATS)
    if not 1 <= 2 * width <= gate_up.shape[1]:
        raise ShapeError("width", f"1 to half of gate_up's {gate_up.shape[1]} columns", width)
    if activation not in get_args(Activation):
        raise ShapeError("activation", f"one of {get_args(Activation)}", activation)
    if bias is not None:
        check_vector("bias", bias, FLOATS, 2 * width)
        check_devices({"gate_up": gate_up, "bias": bias})
    if core is not None:
        check_epilogue(core, "gate_up", gate_up, (width, width))


def _launch(
    gate_up: Tensor,
    width: int,
    activation: str,
    bias: Tensor | None,
    core: CoreEpilogue | None,
    config: SiluConfig | None,
) -> Tensor:
    require_triton()
    from shoal.kernels.silu_mul.jit import silu_mul_kernel

    tokens = gate_up.shape[0]
    out = torch.empty((tokens, width), dtype=gate_up.dtype, device=gate_up.device)
    if tokens == 0:
        return out
    chosen = config or default_config(core)
    silu_mul_kernel[(-(-tokens // chosen.tile), -(-width // chosen.block_n))](
        gate_up_ptr=gate_up,
        bias_ptr=bias,
        out_ptr=out,
        tokens=tokens,
        width=width,
        gate_up_stride=gate_up.stride(0),
        **epilogue_arguments(core),
        ACTIVATION=activation,
        TILE=chosen.tile,
        BLOCK_N=chosen.block_n,
        FLOAT32_DOT=epilogue_dot_in_float32(core),
        num_warps=chosen.num_warps,
    )
    return out
