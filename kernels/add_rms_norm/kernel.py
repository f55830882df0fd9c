"""``add_rms_norm``: residual add and RMS norm of whole rows, for models that cannot defer the norm.

Owns argument checks, dispatch and launch shapes. Dispatch goes by device alone: CPU tensors run
the reference, GPU tensors the Triton kernel. ``launch_add_rms_norm`` always launches; on CPU
tensors that needs Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.add_rms_norm.reference import add_rms_norm_reference
from shoal.kernels.errors import ShapeError, check_devices, check_matrix, check_vector
from shoal.kernels.launching import FLOATS, overlap_options, power_of_two, require_triton

MAX_WIDTH = 16384


@dataclass(frozen=True, slots=True)
class NormConfig:
    """How to launch: a program takes one row."""

    num_warps: int = 8


def add_rms_norm(
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    delta: Tensor | None = None,
    branch: Tensor | None = None,
    bias: Tensor | None = None,
    delta_weight: Tensor | None = None,
    plus_one: bool = False,
    config: NormConfig | None = None,
) -> Tensor:
    """``residual += delta + branch + bias``, then the RMS norm of residual.

    Args:
        residual: ``(tokens, n)``, in and out; n at most 16384. Rows may be strided.
        weight: ``(n,)`` of the norm.
        eps: added to the mean square, of both norms.
        delta: ``(tokens, n or more)``, a GEMM's output; columns beyond n are not looked at.
            None: nothing is added and residual stays as it is.
        branch: ``(tokens, n)``, a further addend that is already scaled.
        bias: ``(n,)``, a further addend.
        delta_weight: ``(n,)``: the whole addend goes through an RMS norm of this weight before it
            is added (the sandwich norms of Gemma 2 and 3).
        plus_one: both norms multiply by ``1 + weight``.
        config: launch parameters, for measurements.

    Floats are float32, float16 or bfloat16, each its own; the arithmetic is float32. The norm is
    taken of residual as it is stored, after rounding.

    Returns:
        ``(tokens, n)`` in residual's dtype, newly allocated.

    Raises:
        ShapeError: a shape, dtype, stride or device is wrong (names the argument).
        TritonMissing: the tensors are on a GPU and Triton is not installed.

    Cost: reads ``2·tokens·n`` and writes as much (norm alone: half). Memory bound.
    """
    _check(residual, weight, delta, branch, bias, delta_weight)
    if residual.device.type == "cpu":
        return add_rms_norm_reference(
            residual, weight, eps, delta, branch, bias, delta_weight, plus_one
        )
    return _launch(residual, weight, eps, delta, branch, bias, delta_weight, plus_one, config)


def launch_add_rms_norm(
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    delta: Tensor | None = None,
    branch: Tensor | None = None,
    bias: Tensor | None = None,
    delta_weight: Tensor | None = None,
    plus_one: bool = False,
    config: NormConfig | None = None,
) -> Tensor:
    """``add_rms_norm`` through Triton on any device; CPU tensors need ``TRITON_INTERPRET=1``."""
    _check(residual, weight, delta, branch, bias, delta_weight)
    return _launch(residual, weight, eps, delta, branch, bias, delta_weight, plus_one, config)


def default_config(n: int) -> NormConfig:
    """The launch parameters for rows of ``n``."""
    # Not swept yet. A thread holds 16 elements of a row.
    return NormConfig(min(16, max(1, power_of_two(n) // 512)))


def _check(
    residual: Tensor,
    weight: Tensor,
    delta: Tensor | None,
    branch: Tensor | None,
    bias: Tensor | None,
    delta_weight: Tensor | None,
) -> None:
    check_matrix("residual", residual, FLOATS)
    tokens, n = residual.shape
    if not 1 <= n <= MAX_WIDTH:
        raise ShapeError("residual", f"1 to {MAX_WIDTH} columns", n)
    check_vector("weight", weight, FLOATS, n)
    for name, vector in (("bias", bias), ("delta_weight", delta_weight)):
        if vector is not None:
            check_vector(name, vector, FLOATS, n)
    if branch is not None:
        check_matrix("branch", branch, FLOATS)
        if branch.shape != residual.shape:
            raise ShapeError("branch", f"shape {(tokens, n)}", tuple(branch.shape))
    if delta is None:
        for name, extra in (
            ("branch", branch),
            ("bias", bias),
            ("delta_weight", delta_weight),
        ):
            if extra is not None:
                raise ShapeError(name, "None without delta", "a value")
    else:
        check_matrix("delta", delta, FLOATS)
        if delta.shape[0] != tokens or delta.shape[1] < n:
            raise ShapeError("delta", f"shape ({tokens}, {n} or more)", tuple(delta.shape))
    check_devices(
        {
            "residual": residual,
            "weight": weight,
            "delta": delta,
            "branch": branch,
            "bias": bias,
            "delta_weight": delta_weight,
        }
    )


def _launch(
    residual: Tensor,
    weight: Tensor,
    eps: float,
    delta: Tensor | None,
    branch: Tensor | None,
    bias: Tensor | None,
    delta_weight: Tensor | None,
    plus_one: bool,
    config: NormConfig | None,
) -> Tensor:
    require_triton()
    from shoal.kernels.add_rms_norm.jit import add_rms_norm_kernel

    tokens, n = residual.shape
    out = torch.empty((tokens, n), dtype=residual.dtype, device=residual.device)
    if tokens == 0:
        return out
    chosen = config or default_config(n)
    add_rms_norm_kernel[(tokens,)](
        residual_ptr=residual,
        delta_ptr=delta,
        branch_ptr=branch,
        bias_ptr=bias,
        delta_weight_ptr=delta_weight,
        weight_ptr=weight,
        out_ptr=out,
        n=n,
        residual_stride=residual.stride(0),
        delta_stride=0 if delta is None else delta.stride(0),
        branch_stride=0 if branch is None else branch.stride(0),
        eps=eps,
        PLUS_ONE=plus_one,
        BLOCK=power_of_two(n),
        **overlap_options(residual.device, early=True),
        num_warps=chosen.num_warps,
    )
    return out
