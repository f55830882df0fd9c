"""The adapted linears of a fleet as autograd sees them: one function a method, forward and back.

Both put the adapter's small product first and let the base's GEMM add onto it, forward and
backward: a GEMM that large hides reading what it adds to. Of the activations only the rank-wide one
is kept (``h`` or ``S_r(x)``), nothing of a linear's width.

The gradient of a bank is not returned: it is written where the optimiser wants it, for the lanes
of the step alone. So a bank of any size costs a step nothing but the lanes that it trains.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.kernels.fold_sum.kernel import fold_sum
from shoal.kernels.lane_matmul.kernel import lane_matmul
from shoal.kernels.lane_outer.kernel import lane_outer
from shoal.kernels.lane_rows import LaneRows


@dataclass(slots=True)
class Step:
    """What all linears of a model must know of the step that is running.

    Attributes:
        rows: which row is whose; the tables stay where they are while a graph is replayed.
    """

    rows: LaneRows | None = None

    def owners(self) -> LaneRows:
        """The table of the running step."""
        assert self.rows is not None, "a step says whose rows it has before it runs"
        return self.rows


def core_linear(
    x: Tensor,
    cores: Tensor,
    grads: Tensor,
    weight: Tensor,
    basis: Tensor,
    down: Tensor,
    rows: LaneRows,
    scale: float,
) -> Tensor:
    """LoRA-XS: ``x Wᵀ + s·((x Aᵀ) Rᵀ) Bᵀ``, every row with the ``R`` of its lane.

    Args:
        x: ``(rows, length, d_in)``.
        cores: ``R (lanes, r, r)`` float32.
        grads: like ``cores``; ``backward`` writes the lanes of the step.
        weight: ``W (d_out, d_in)``, as x.
        basis: ``B (d_out, r)``, as x.
        down: ``A = Bᵀ W (r, d_in)``, as x.
        rows: which row is whose.
        scale: ``s``.

    Returns:
        ``(rows, length, d_out)`` in x's dtype.
    """
    arguments = (x, cores, grads, weight, basis, down, rows, scale)
    out: Tensor = _CoreLinear.apply(*arguments)  # type: ignore[no-untyped-call]
    return out


def fold_linear(x: Tensor, blocks: Tensor, grads: Tensor, weight: Tensor, rows: LaneRows) -> Tensor:
    """MiSS: ``x Wᵀ + S_r(x) D``, every row with the ``D`` of its lane.

    Args:
        x: ``(rows, length, d_in)``.
        blocks: ``D (lanes, r, d_out)`` float32.
        grads: like ``blocks``; ``backward`` writes the lanes of the step.
        weight: ``W (d_out, d_in)``, as x.
        rows: which row is whose.

    Returns:
        ``(rows, length, d_out)`` in x's dtype.
    """
    arguments = (x, blocks, grads, weight, rows)
    out: Tensor = _FoldLinear.apply(*arguments)  # type: ignore[no-untyped-call]
    return out


class _CoreLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cores: Tensor,
        grads: Tensor,
        weight: Tensor,
        basis: Tensor,
        down: Tensor,
        rows: LaneRows,
        scale: float,
    ) -> Tensor:
        h = F.linear(x, down)
        z = torch.empty_like(h)
        lane_matmul(h, cores.mT, rows.owners, z, scale=scale)
        y = F.linear(z, basis)
        _flat(y).addmm_(_flat(x), weight.T)
        ctx.save_for_backward(h, cores, weight, basis, down)
        ctx.grads, ctx.rows, ctx.scale = grads, rows, scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, cores, weight, basis, down = ctx.saved_tensors
        dz = dy @ basis
        lane_outer(dz, h, ctx.rows, ctx.grads, scale=ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dh = torch.empty_like(dz)
            lane_matmul(dz, cores, ctx.rows.owners, dh, scale=ctx.scale)
            dx = dh @ down
            _flat(dx).addmm_(_flat(dy), weight)
        return dx, *(None,) * 7


class _FoldLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, blocks: Tensor, grads: Tensor, weight: Tensor, rows: LaneRows
    ) -> Tensor:
        rank = blocks.shape[1]
        folded = _fold(x, rank)
        y = F.linear(x, weight)
        lane_matmul(folded, blocks, rows.owners, y, add=True)
        ctx.save_for_backward(folded, blocks, weight)
        ctx.grads, ctx.rows = grads, rows
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        folded, blocks, weight = ctx.saved_tensors
        dy = dy.contiguous()
        lane_outer(folded, dy, ctx.rows, ctx.grads)
        dx = None
        if ctx.needs_input_grad[0]:
            dfolded = torch.empty_like(folded)
            lane_matmul(dy, blocks.mT, ctx.rows.owners, dfolded)
            dx = _unfold(dfolded.to(dy.dtype), weight.shape[1])
            _flat(dx).addmm_(_flat(dy), weight)
        return dx, *(None,) * 4


def _fold(x: Tensor, rank: int) -> Tensor:
    """``S_r(x) (rows, length, r)`` float32."""
    flat = _flat(x)
    ranks = torch.full((flat.shape[0],), rank, dtype=torch.int32, device=x.device)
    return fold_sum(flat, ranks, rank).view(*x.shape[:-1], rank)


def _unfold(folded: Tensor, width: int) -> Tensor:
    """What ``_fold`` does to a gradient: ``out[…, j] = folded[…, j mod r]``; ``(…, width)``."""
    rank = folded.shape[-1]
    repeated = folded.repeat(*(1,) * (folded.dim() - 1), -(-width // rank))
    return repeated if repeated.shape[-1] == width else repeated[..., :width].contiguous()


def _flat(x: Tensor) -> Tensor:
    """``(rows, length, d)`` as ``(rows·length, d)``."""
    return x.reshape(-1, x.shape[-1])
