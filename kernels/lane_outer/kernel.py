"""``lane_outer``: each lane's sum over its tokens of ``aᵀ b``: the gradient of its matrices.

In training of many adapters at once it is LoRA-XS's ``dR = s·Σ dzᵀ h`` and MiSS's
``dD = Σ S_r(x)ᵀ dy``. Owns argument checks, dispatch and launch shapes. Dispatch goes by device
alone: CPU tensors run the reference, GPU tensors the Triton kernels. ``launch_lane_outer`` always
launches; on CPU tensors that needs Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.errors import ShapeError, check_devices
from shoal.kernels.lane_outer.reference import lane_outer_reference
from shoal.kernels.lane_rows import LaneRows, check_rows, check_steps
from shoal.kernels.launching import FLOATS, dot_in_float32, power_of_two, require_triton

# Programs that keep a large GPU busy; a lane's rows are split while there are fewer.
BUSY_PROGRAMS = 256
SPLITS_MAX = 16


@dataclass(frozen=True, slots=True)
class LaneOuterConfig:
    """How to launch.

    Attributes:
        tile: tokens a step. 16 at least, as are the blocks.
        block_m, block_n: the part of the product that one program makes.
        splits: programs among which a lane's rows are divided.
    """

    tile: int = 64
    block_m: int = 64
    block_n: int = 64
    splits: int = 1
    num_warps: int = 4


def lane_outer(
    a: Tensor,
    b: Tensor,
    rows: LaneRows,
    grads: Tensor,
    *,
    scale: float = 1.0,
    config: LaneOuterConfig | None = None,
) -> None:
    """Write ``grads[lane, i] = scale · Σ a[row, t, i]ᵀ b[row, t, i]`` over its rows and tokens.

    Args:
        a: ``(rows, length, modules, m)``. The last axis is contiguous.
        b: ``(rows, length, modules, n)``, likewise.
        rows: which row is whose. Lanes that it does not name keep what they hold.
        grads: ``(lanes, modules, m, n)`` float32, out. The last axis is contiguous.
        scale: multiplies the sums.
        config: launch parameters, for measurements.

    a and b are float32, float16 or bfloat16, each its own; sums are float32. On a GPU products of
    two equal 16-bit types are exact, of float32 exact to float32, and of a mixture tf32.
    The same call gives the same bits: no atomics, and the order of a sum follows from the shapes
    and the table.

    Raises:
        ShapeError: a shape, dtype, stride or device is wrong (names the argument).
        TritonMissing: the tensors are on a GPU and Triton is not installed.

    Cost: a and b once (for wide products once per block), grads once.
    """
    _check(a, b, rows, grads)
    if a.device.type == "cpu":
        lane_outer_reference(a, b, rows, grads, scale=scale)
    else:
        _launch(a, b, rows, grads, scale, config)


def launch_lane_outer(
    a: Tensor,
    b: Tensor,
    rows: LaneRows,
    grads: Tensor,
    *,
    scale: float = 1.0,
    config: LaneOuterConfig | None = None,
) -> None:
    """``lane_outer`` through Triton on any device; CPU tensors need ``TRITON_INTERPRET=1``."""
    _check(a, b, rows, grads)
    _launch(a, b, rows, grads, scale, config)


def default_config(
    rows: int, segments: int, length: int, m: int, n: int, modules: int = 1
) -> LaneOuterConfig:
    """The launch parameters for ``segments`` lanes in ``rows`` rows. Not swept yet."""
    block_m = min(64, power_of_two(m, 16))
    block_n = min(128 if block_m <= 32 else 64, power_of_two(n, 16))
    programs = segments * modules * -(-m // block_m) * -(-n // block_n)
    # Lanes have rows / segments rows on average: more parts than that would mostly be empty.
    most = min(SPLITS_MAX, -(-rows // max(1, segments)))
    splits = max(1, min(most, BUSY_PROGRAMS // max(1, programs)))
    return LaneOuterConfig(min(64, power_of_two(length, 16)), block_m, block_n, splits)


def _check(a: Tensor, b: Tensor, rows: LaneRows, grads: Tensor) -> None:
    check_steps("a", a, FLOATS)
    check_steps("b", b, FLOATS)
    if a.shape[:3] != b.shape[:3]:
        raise ShapeError("b", f"shape {(*a.shape[:3], 'n')}", tuple(b.shape))
    check_steps("grads", grads, (torch.float32,))
    modules, m, n = a.shape[2], a.shape[3], b.shape[3]
    if grads.shape[1:] != (modules, m, n):
        raise ShapeError("grads", f"shape (lanes, {modules}, {m}, {n})", tuple(grads.shape))
    check_rows(rows, a.shape[0])
    check_devices({"a": a, "b": b, "grads": grads, **{f"rows.{k}": v for k, v in _named(rows)}})


def _named(rows: LaneRows) -> list[tuple[str, Tensor]]:
    return list(zip(rows._fields, rows, strict=True))


def _launch(
    a: Tensor,
    b: Tensor,
    rows: LaneRows,
    grads: Tensor,
    scale: float,
    config: LaneOuterConfig | None,
) -> None:
    require_triton()
    from shoal.kernels.lane_outer.jit import lane_outer_kernel, lane_sum_kernel

    count, length, modules, m = a.shape
    n = b.shape[3]
    segments = rows.firsts.shape[0]
    if segments == 0 or grads.numel() == 0:
        return
    chosen = config or default_config(count, segments, length, m, n, modules)
    splits = chosen.splits
    sums = grads
    if splits > 1:
        shape = (splits, segments, modules, m, n)
        sums = torch.empty(shape, dtype=torch.float32, device=a.device)
    mixed = a.dtype != b.dtype
    grid = (segments * splits, -(-m // chosen.block_m) * -(-n // chosen.block_n), modules)
    lane_outer_kernel[grid](
        a,
        b,
        rows.firsts,
        rows.counts,
        rows.lanes,
        sums,
        length,
        m,
        n,
        scale,
        a.stride(0),
        a.stride(1),
        a.stride(2),
        b.stride(0),
        b.stride(1),
        b.stride(2),
        sums.stride(-4),
        sums.stride(-3),
        sums.stride(-2),
        sums.stride(0) if splits > 1 else 0,
        TILE=chosen.tile,
        BLOCK_M=chosen.block_m,
        BLOCK_N=chosen.block_n,
        SPLITS=splits,
        UPCAST=mixed or dot_in_float32(a.dtype, b.dtype),
        PRECISION="tf32" if mixed else "ieee",
        num_warps=chosen.num_warps,
    )
    if splits > 1:
        block = 256
        lane_sum_kernel[(segments, -(-m * n // block), modules)](
            sums,
            rows.counts,
            rows.lanes,
            grads,
            m * n,
            n,
            sums.stride(1),
            sums.stride(0),
            grads.stride(0),
            grads.stride(1),
            grads.stride(2),
            SPLITS=splits,
            BLOCK=block,
        )
