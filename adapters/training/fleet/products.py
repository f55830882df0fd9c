"""The adapted linears of a fleet as autograd sees them: one function a method, forward and back.

Linears that share their input (q, k and v; gate and up) are one function: what is made of the
input is made once, and their gradients are added up inside of products. The adapter's small product
comes first and the base's GEMM adds onto it, forward and backward: a GEMM that large hides reading
what it adds to. Of the activations only the rank-wide ones are kept (``h`` or ``S_r(x)``), nothing
of a linear's width.

The gradient of a bank is not returned: it is written where the optimiser wants it, for the lanes
of the step alone. So a bank of any size costs a step nothing but the lanes that it trains.
"""

from collections.abc import Sequence
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


@dataclass(frozen=True, slots=True)
class Frozen:
    """What a linear has of the base, as x.

    Attributes:
        weight: ``W (d_out, d_in)``.
        bias: ``(d_out,)`` or None.
        basis: LoRA-XS's ``B (d_out, r)``; None for MiSS.
    """

    weight: Tensor
    bias: Tensor | None = None
    basis: Tensor | None = None


def core_linears(
    x: Tensor,
    cores: Tensor,
    grads: Tensor,
    down: Tensor,
    linears: Sequence[Frozen],
    rows: LaneRows,
    scale: float,
) -> tuple[Tensor, ...]:
    """LoRA-XS: ``x Wᵀ + s·((x Aᵀ) Rᵀ) Bᵀ + bias`` of each linear, every row with its lane's ``R``.

    Args:
        x: ``(rows, length, d_in)``, the input of all.
        cores: ``R (lanes, linears, r, r)`` float32.
        grads: like ``cores``; ``backward`` writes the lanes of the step.
        down: ``A``, one below the other: ``(linears·r, d_in)``, as x.
        linears: at least one.
        rows: which row is whose.
        scale: ``s``.

    Returns:
        For each linear ``(rows, length, d_out)`` in x's dtype.
    """
    arguments = (x, cores, grads, down, tuple(linears), rows, scale)
    outs: tuple[Tensor, ...] = _CoreLinears.apply(*arguments)  # type: ignore[no-untyped-call]
    return outs


def fold_linears(
    x: Tensor,
    blocks: Sequence[Tensor],
    grads: Sequence[Tensor],
    linears: Sequence[Frozen],
    rows: LaneRows,
) -> tuple[Tensor, ...]:
    """MiSS: ``x Wᵀ + S_r(x) D + bias`` of each linear, every row with the ``D`` of its lane.

    Args:
        x: ``(rows, length, d_in)``, the input of all.
        blocks: of each linear ``D (lanes, r, d_out)`` float32.
        grads: like ``blocks``; ``backward`` writes the lanes of the step.
        linears: at least one.
        rows: which row is whose.

    Returns:
        For each linear ``(rows, length, d_out)`` in x's dtype.
    """
    arguments = (x, tuple(grads), tuple(linears), rows, *blocks)
    outs: tuple[Tensor, ...] = _FoldLinears.apply(*arguments)  # type: ignore[no-untyped-call]
    return outs


class _CoreLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cores: Tensor,
        grads: Tensor,
        down: Tensor,
        linears: tuple[Frozen, ...],
        rows: LaneRows,
        scale: float,
    ) -> tuple[Tensor, ...]:
        rank = cores.shape[-1]
        h = F.linear(x, down).view(*x.shape[:2], len(linears), rank)
        z = _linear_by_linear(h)
        lane_matmul(h, cores.mT, rows.owners, z, scale=scale)
        outs = []
        for i, linear in enumerate(linears):
            assert linear.basis is not None
            y = F.linear(z[:, :, i], linear.basis)
            _flat(y).addmm_(_flat(x), linear.weight.T)
            outs.append(y if linear.bias is None else y.add_(linear.bias))
        ctx.save_for_backward(h, cores, down)
        ctx.set_materialize_grads(False)
        ctx.grads, ctx.linears, ctx.rows, ctx.scale = grads, linears, rows, scale
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        h, cores, down = ctx.saved_tensors
        given = [(i, dy) for i, dy in enumerate(dys) if dy is not None]
        if not given:
            return (None,) * 7
        dz = _linear_by_linear(h)
        for i, dy in enumerate(dys):
            if dy is None:
                dz[:, :, i].zero_()
            else:
                torch.mm(_flat(dy), ctx.linears[i].basis, out=_flat(dz[:, :, i]))
        if len(given) == len(dys):
            lane_outer(dz, h, ctx.rows, ctx.grads, scale=ctx.scale)
        else:  # what another call has written of the others stays
            for i, _ in given:
                own = slice(i, i + 1)
                left, right = dz[:, :, own], h[:, :, own]
                lane_outer(left, right, ctx.rows, ctx.grads[:, own], scale=ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dh = torch.empty_like(h)
            lane_matmul(dz, cores, ctx.rows.owners, dh, scale=ctx.scale)
            dx = dh.flatten(2) @ down
            for i, dy in given:
                _flat(dx).addmm_(_flat(dy), ctx.linears[i].weight)
        return dx, *(None,) * 6


class _FoldLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        grads: tuple[Tensor, ...],
        linears: tuple[Frozen, ...],
        rows: LaneRows,
        *blocks: Tensor,
    ) -> tuple[Tensor, ...]:
        folded = _fold(x, blocks[0].shape[1])
        outs = []
        for linear, block in zip(linears, blocks, strict=True):
            y = F.linear(x, linear.weight, linear.bias)
            lane_matmul(_one(folded), block[:, None], rows.owners, _one(y), add=True)
            outs.append(y)
        ctx.save_for_backward(folded, *blocks)
        ctx.set_materialize_grads(False)
        ctx.grads, ctx.linears, ctx.rows = grads, linears, rows
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        folded, *blocks = ctx.saved_tensors
        given = [(i, dy.contiguous()) for i, dy in enumerate(dys) if dy is not None]
        dx = None
        for i, dy in given:
            lane_outer(_one(folded), _one(dy), ctx.rows, ctx.grads[i][:, None])
        if given and ctx.needs_input_grad[0]:
            dfolded = torch.zeros_like(folded)
            for i, dy in given:
                matrices = blocks[i].mT[:, None]
                lane_matmul(_one(dy), matrices, ctx.rows.owners, _one(dfolded), add=True)
            dx = _unfold(dfolded.to(given[0][1].dtype), ctx.linears[0].weight.shape[1])
            for i, dy in given:
                _flat(dx).addmm_(_flat(dy), ctx.linears[i].weight)
        return dx, *(None,) * (3 + len(blocks))


def _linear_by_linear(like: Tensor) -> Tensor:
    """Room for ``(rows, length, linears, r)``; of each linear the values lie in one piece."""
    rows, length, linears, rank = like.shape
    room = torch.empty((linears, rows, length, rank), dtype=like.dtype, device=like.device)
    return room.permute(1, 2, 0, 3)


def _one(x: Tensor) -> Tensor:
    """``(rows, length, d)`` as of one linear."""
    return x[:, :, None]


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
