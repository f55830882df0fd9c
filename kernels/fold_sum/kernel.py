"""``fold_sum``: the part of MiSS that is the same for all adapters of a rank.

Owns argument checks, dispatch and launch shapes. Dispatch goes by device alone: CPU tensors run
the reference, GPU tensors the Triton kernel. ``launch_fold_sum`` always launches; on CPU tensors
that needs Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.errors import ShapeError, check_devices, check_matrix, check_vector
from shoal.kernels.fold_sum.reference import fold_sum_reference
from shoal.kernels.launching import FLOATS, power_of_two, require_triton

MAX_RANK = 1024


@dataclass(frozen=True, slots=True)
class FoldConfig:
    """How to launch: ``elements`` of x in flight per program and step."""

    elements: int = 2048
    num_warps: int = 4


def fold_sum(x: Tensor, ranks: Tensor, columns: int, *, config: FoldConfig | None = None) -> Tensor:
    """Fold each row with its own stride: ``out[t, i] = Σ_{j mod ranks[t] = i} x[t, j]``.

    Args:
        x: ``(tokens, width)``, float32, float16 or bfloat16. Rows may be strided; ``width`` need
            not be a multiple of any rank.
        ranks: ``(tokens,)`` int32, 0 to ``columns``; 0: the token is left out. The upper bound is
            a promise: the GPU cannot check it without a synchronisation.
        columns: 1 to 1024. A power of two is the fastest, with ranks that are it halved some times.
        config: launch parameters, for measurements.

    Returns:
        ``(tokens, columns)`` float32, newly allocated; what lies beyond a token's rank is
        undefined. It stays float32 because it sums ``width / rank`` terms without scaling.

    Raises:
        ShapeError: a shape, dtype or stride is wrong (names the argument).
        TritonMissing: x is on a GPU and Triton is not installed.

    Cost: reads the used rows of x once; memory bound.
    """
    _check(x, ranks, columns)
    if x.device.type == "cpu":
        return fold_sum_reference(x, ranks, columns)
    return _launch(x, ranks, columns, config)


def launch_fold_sum(
    x: Tensor, ranks: Tensor, columns: int, *, config: FoldConfig | None = None
) -> Tensor:
    """``fold_sum`` through Triton on any device; CPU tensors need ``TRITON_INTERPRET=1``."""
    _check(x, ranks, columns)
    return _launch(x, ranks, columns, config)


def default_config(tokens: int, columns: int) -> FoldConfig:
    """The launch parameters for ``tokens`` rows and ranks up to ``columns``."""
    # Sweep on an H100, 2026-11 (results/h100-kernels.jsonl). Small steps win everywhere. Up to a
    # few hundred rows there are too few programs to fill the GPU, so each takes many warps (1 row
    # of 14336: 5.7 µs, with 4 warps of 4096 elements 10.0); beyond, the sum across warps at
    # the end is what costs (2048 rows of 4096, rank 64: 2 warps 13.6 µs, 4 warps 16.3).
    if tokens <= 512:
        return FoldConfig(num_warps=16)
    return FoldConfig(num_warps=4 if columns <= 16 else 2)


def _check(x: Tensor, ranks: Tensor, columns: int) -> None:
    check_matrix("x", x, FLOATS)
    check_vector("ranks", ranks, (torch.int32,), x.shape[0])
    check_devices({"x": x, "ranks": ranks})
    if not 1 <= columns <= MAX_RANK:
        raise ShapeError("columns", f"1 to {MAX_RANK}", columns)


def _launch(x: Tensor, ranks: Tensor, columns: int, config: FoldConfig | None) -> Tensor:
    require_triton()
    from shoal.kernels.fold_sum.jit import fold_sum_kernel

    tokens, width = x.shape
    chosen = config or default_config(tokens, columns)
    padded = power_of_two(columns)
    out = torch.empty((tokens, columns), dtype=torch.float32, device=x.device)
    if tokens == 0:
        return out
    fold_sum_kernel[(tokens,)](
        x,
        ranks,
        out,
        width,
        x.stride(0),
        out.stride(0),
        RANK=padded,
        FOLDS=max(1, chosen.elements // padded),
        HALVINGS=padded.bit_length() - 1,
        num_warps=chosen.num_warps,
    )
    return out
