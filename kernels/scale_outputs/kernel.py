"""``scale_outputs``: every token's outputs times the row scales of its own adapter (DoRA).

Owns argument checks, dispatch and launch shapes. Dispatch goes by device alone: CPU tensors run
the reference, GPU tensors the Triton kernel. ``launch_scale_outputs`` always launches; on CPU
tensors that needs Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.errors import ShapeError, check_devices, check_matrix, check_vector
from shoal.kernels.launching import ALIGNMENTS, FLOATS, require_triton
from shoal.kernels.scale_outputs.reference import scale_outputs_reference


@dataclass(frozen=True, slots=True)
class ScaleConfig:
    """How to launch: outputs per program."""

    block_n: int = 1024
    num_warps: int = 4


def scale_outputs(
    y: Tensor,
    arena: Tensor,
    addresses: Tensor,
    *,
    offset: int,
    alignment: int = 1,
    config: ScaleConfig | None = None,
) -> None:
    """Scale each token's outputs in place: ``y[t, i] *= 1 + arena[addresses[t] + offset + i]``.

    Args:
        y: ``(tokens, n)``, in and out. Rows may be strided.
        arena: ``(elements,)``, all adapters: what a factor differs from 1 by. Read only.
        addresses: ``(tokens,)`` int64, where a token's record starts in the arena; -1: it has none,
            and its row keeps its bits. So does an output whose entry is zero.
        offset: of the n entries within every record.
        alignment: a number that divides every ``address + offset`` (1, 2, 4, 8 or 16). A promise,
            not checked; nor is that the entries lie inside the arena.
        config: launch parameters, for measurements.

    y and arena are float32, float16 or bfloat16, each its own; the arithmetic is float32 and the
    product is rounded once.

    Raises:
        ShapeError: a shape, dtype, stride or device is wrong (names the argument).
        TritonMissing: the tensors are on a GPU and Triton is not installed.

    Cost: reads the entries and reads and writes the rows of tokens that have an address; memory
    bound.
    """
    _check(y, arena, addresses, offset, alignment)
    if y.device.type == "cpu":
        scale_outputs_reference(y, arena, addresses, offset)
    else:
        _launch(y, arena, addresses, offset, alignment, config)


def launch_scale_outputs(
    y: Tensor,
    arena: Tensor,
    addresses: Tensor,
    *,
    offset: int,
    alignment: int = 1,
    config: ScaleConfig | None = None,
) -> None:
    """``scale_outputs`` through Triton on any device; CPU tensors need ``TRITON_INTERPRET=1``."""
    _check(y, arena, addresses, offset, alignment)
    _launch(y, arena, addresses, offset, alignment, config)


def _check(y: Tensor, arena: Tensor, addresses: Tensor, offset: int, alignment: int) -> None:
    check_matrix("y", y, FLOATS)
    check_vector("arena", arena, FLOATS, None)
    check_vector("addresses", addresses, (torch.int64,), y.shape[0])
    if offset < 0:
        raise ShapeError("offset", "at least 0", offset)
    if alignment not in ALIGNMENTS:
        raise ShapeError("alignment", f"one of {ALIGNMENTS}", alignment)
    check_devices({"y": y, "arena": arena, "addresses": addresses})


def _launch(
    y: Tensor,
    arena: Tensor,
    addresses: Tensor,
    offset: int,
    alignment: int,
    config: ScaleConfig | None,
) -> None:
    require_triton()
    from shoal.kernels.scale_outputs.jit import scale_outputs_kernel

    tokens, n = y.shape
    if tokens == 0 or n == 0:
        return
    chosen = config or ScaleConfig()  # not swept yet: 16 bytes a thread and operand
    scale_outputs_kernel[(tokens, -(-n // chosen.block_n))](
        y,
        arena,
        addresses,
        n,
        offset,
        y.stride(0),
        ALIGN=alignment,
        BLOCK_N=chosen.block_n,
        num_warps=chosen.num_warps,
    )
