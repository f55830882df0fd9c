"""Poisoned inputs and tolerances for kernel tests and ``--check``. Imports no test framework.

An op must read only what its arguments describe. Inputs are therefore views into buffers filled
with NaN: a load without its mask turns the result into NaN instead of passing by luck.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Relative and absolute tolerance by dtype, for outputs of magnitude one. The float32 value covers
# sums of some thousand terms in another order; the others are one rounding of the output plus one
# of an operand of the matrix unit.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def random(
    shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype, scale: float = 1.0
) -> Tensor:
    """Normal values drawn on the CPU, so that every device sees the same ones."""
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def poisoned_rows(values: Tensor, rows: int = 2, columns: int = 3) -> Tensor:
    """A view equal to ``values`` (2 axes) with NaN before, after and between its rows."""
    height, width = values.shape
    buffer = values.new_full((height + 2 * rows, width + 2 * columns), float("nan"))
    view = buffer[rows : rows + height, columns : columns + width]
    view.copy_(values)
    return view


def poisoned_arena(blocks: Sequence[Tensor], gap: int = 8) -> tuple[Tensor, list[int]]:
    """One flat NaN-filled tensor that holds ``blocks``; every block starts at a multiple of 8.

    Returns:
        The arena and the element address of each block. At least ``gap`` NaN elements lie on
        both sides of each block.
    """
    addresses = []
    end = 0
    for block in blocks:
        start = -(-(end + gap) // 8) * 8
        addresses.append(start)
        end = start + block.numel()
    dtype = blocks[0].dtype if blocks else torch.float32
    arena = torch.full((end + gap,), float("nan"), dtype=dtype)
    for start, block in zip(addresses, blocks, strict=True):
        arena[start : start + block.numel()] = block.reshape(-1)
    return arena, addresses


def max_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to ``max(1, |expected|)``; NaN anywhere gives infinity."""
    if actual.numel() == 0:
        return 0.0
    want = expected.double()
    error = (actual.double() - want).abs() / want.abs().clamp(min=1.0)
    return float(torch.nan_to_num(error, nan=float("inf")).max())


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, slack: float = 1.0) -> None:
    """Require ``max_error`` within the tolerance of ``dtype``, the coarsest dtype involved.

    ``slack`` multiplies the tolerance, for cases whose extremes are more extreme.
    """
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    error = max_error(actual, expected)
    limit = TOLERANCE[dtype] * slack
    assert error <= limit, f"error {error:.3g} exceeds {limit:.3g} ({dtype})"
