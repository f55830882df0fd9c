"""``lane_matmul``: the tokens of each row times the matrices of the row's lane.

In training of many adapters at once it is LoRA-XS's ``z = s·h Rᵀ`` and ``dh = s·dz R``, and MiSS's
``y += S_r(x) D`` and ``dS = dy Dᵀ``. Owns argument checks, dispatch and launch shapes. Dispatch
goes by device alone: CPU tensors run the reference, GPU tensors the Triton kernel.
``launch_lane_matmul`` always launches; on CPU tensors that needs Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.errors import ShapeError, check_devices, check_vector
from shoal.kernels.lane_matmul.reference import lane_matmul_reference
from shoal.kernels.lane_rows import check_steps
from shoal.kernels.launching import FLOATS, power_of_two, require_triton


@dataclass(frozen=True, slots=True)
class LaneMatmulConfig:
    """How to launch: tokens, inputs a step and outputs of a program; each 16 at least."""

    tile: int = 64
    block_k: int = 64
    block_n: int = 64
    num_warps: int = 4


def lane_matmul(
    x: Tensor,
    bank: Tensor,
    owners: Tensor,
    out: Tensor,
    *,
    scale: float = 1.0,
    add: bool = False,
    config: LaneMatmulConfig | None = None,
) -> None:
    """Write ``out[b, t, m] = scale · x[b, t, m] @ bank[owners[b], m]``, or add it to ``out``.

    Args:
        x: ``(rows, length, modules, k)``. The last axis is contiguous.
        bank: ``(lanes, modules, k, n)`` float32, any strides: a transposed view multiplies by
            ``Rᵀ``.
        owners: ``(rows,)`` int32, below ``lanes`` (a promise); -1: the row's outputs are zeros, or
            stay as they are with ``add``.
        out: ``(rows, length, modules, n)``, in and out. The last axis is contiguous.
        scale: multiplies the product.
        add: whether it is added.
        config: launch parameters, for measurements.

    x and out are float32, float16 or bfloat16, each its own; sums are float32. Where either is a
    16-bit type a GPU multiplies in tf32, otherwise in float32.

    Raises:
        ShapeError: a shape, dtype, stride or device is wrong (names the argument).
        TritonMissing: the tensors are on a GPU and Triton is not installed.

    Cost: x, out and each used matrix once per ``tile`` tokens; memory bound for small k or n.
    """
    _check(x, bank, owners, out)
    if x.device.type == "cpu":
        lane_matmul_reference(x, bank, owners, out, scale=scale, add=add)
    else:
        _launch(x, bank, owners, out, scale, add, config)


def launch_lane_matmul(
    x: Tensor,
    bank: Tensor,
    owners: Tensor,
    out: Tensor,
    *,
    scale: float = 1.0,
    add: bool = False,
    config: LaneMatmulConfig | None = None,
) -> None:
    """``lane_matmul`` through Triton on any device; CPU tensors need ``TRITON_INTERPRET=1``."""
    _check(x, bank, owners, out)
    _launch(x, bank, owners, out, scale, add, config)


def default_config(length: int, k: int, n: int) -> LaneMatmulConfig:
    """The launch parameters for rows of ``length`` tokens. Not swept yet."""
    tile = 64 if length > 32 else power_of_two(length, 16)
    # One of k and n is a rank, the other a rank or a linear's width.
    block_k = min(64, power_of_two(k, 16))
    block_n = min(128 if block_k <= 32 else 64, power_of_two(n, 16))
    return LaneMatmulConfig(tile, block_k, block_n)


def _check(x: Tensor, bank: Tensor, owners: Tensor, out: Tensor) -> None:
    check_steps("x", x, FLOATS)
    check_steps("out", out, FLOATS)
    if bank.dim() != 4 or bank.dtype != torch.float32:
        raise ShapeError("bank", "float32 with 4 axes", (bank.dtype, tuple(bank.shape)))
    rows, length, modules, k = x.shape
    if bank.shape[1:3] != (modules, k):
        raise ShapeError("bank", f"shape (lanes, {modules}, {k}, n)", tuple(bank.shape))
    expected = (rows, length, modules, bank.shape[3])
    if out.shape != expected:
        raise ShapeError("out", f"shape {expected}", tuple(out.shape))
    check_vector("owners", owners, (torch.int32,), rows)
    check_devices({"x": x, "bank": bank, "owners": owners, "out": out})


def _launch(
    x: Tensor,
    bank: Tensor,
    owners: Tensor,
    out: Tensor,
    scale: float,
    add: bool,
    config: LaneMatmulConfig | None,
) -> None:
    require_triton()
    from shoal.kernels.lane_matmul.jit import lane_matmul_kernel

    rows, length, modules, k = x.shape
    n = bank.shape[3]
    if out.numel() == 0:
        return
    chosen = config or default_config(length, k, n)
    exact = x.dtype == out.dtype == torch.float32
    grid = (rows * -(-length // chosen.tile), -(-n // chosen.block_n), modules)
    lane_matmul_kernel[grid](
        x,
        bank,
        owners,
        out,
        length,
        k,
        n,
        scale,
        x.stride(0),
        x.stride(1),
        x.stride(2),
        bank.stride(0),
        bank.stride(1),
        bank.stride(2),
        bank.stride(3),
        out.stride(0),
        out.stride(1),
        out.stride(2),
        TILE=chosen.tile,
        BLOCK_K=chosen.block_k,
        BLOCK_N=chosen.block_n,
        ADD=add,
        PRECISION="ieee" if exact else "tf32",
        num_warps=chosen.num_warps,
    )
