"""``x Wᵀ + S_r(x) D`` as autograd sees it: one function, forward and back.

Kept for the backward pass is ``S_r(x)``, of the rank's width. The adapter's small product comes
first and the base's adds onto it, forward and backward.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.adapters.training.methods.low_rank import padded, padded_rank, wide_bmm


def fold(x: Tensor, rank: int) -> Tensor:
    """``S_r(x) (…, r)`` in x's dtype, ``S_r(x)[i]`` the sum of ``x[j]`` over ``j ≡ i (mod r)``."""
    ragged = -x.shape[-1] % rank
    whole = F.pad(x, (0, ragged)) if ragged else x
    blocks = whole.view(*x.shape[:-1], -1, rank)
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    return blocks.sum(dim=-2, dtype=wide).to(x.dtype)


def unfold(folded: Tensor, width: int) -> Tensor:
    """What ``fold`` does to a gradient: ``out[…, j] = folded[…, j mod r]``, ``(n, width)``."""
    repeated = folded.repeat(1, -(-width // folded.shape[1]))
    return repeated if repeated.shape[1] == width else repeated[:, :width].contiguous()


def fold_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    blocks: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """``x Wᵀ + S_r(x) D + bias`` of each linear, with the ``D`` of each row's lane.

    Args:
        x: ``(lanes·rows, …, d_in)``, the input of all.
        weights: of each linear ``W (d_out, d_in)``, frozen; at least one.
        biases: of each ``(d_out,)`` or None, frozen.
        blocks: of each ``D (lanes, r, d_out)``, usually float32; products are in x's dtype.

    Returns:
        Of each ``(lanes·rows, …, d_out)`` in x's dtype.
    """
    frozen = tuple(weights), tuple(biases)
    outs: tuple[Tensor, ...] = _Folds.apply(x, *frozen, *blocks)  # type: ignore[no-untyped-call]
    return outs


class _Folds(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: tuple[Tensor, ...],
        biases: tuple[Tensor | None, ...],
        *blocks: Tensor,
    ) -> tuple[Tensor, ...]:
        lanes, rank, _ = blocks[0].shape
        width = padded_rank(rank, x.dtype)
        flat = x.reshape(-1, x.shape[-1])
        folded = padded(fold(flat, rank), (len(flat), width), x.dtype).view(lanes, -1, width)
        factors, outs = [], []
        for weight, bias, block in zip(weights, biases, blocks, strict=True):
            d = padded(block, (lanes, width, len(weight)), x.dtype)
            y = x.new_empty((*x.shape[:-1], len(weight)))
            torch.bmm(folded, d, out=y.view(lanes, -1, len(weight)))
            y.view(-1, len(weight)).addmm_(flat, weight.T)
            outs.append(y if bias is None else y.add_(bias))
            factors.append(d)
        ctx.save_for_backward(folded, *factors)
        ctx.weights, ctx.rank, ctx.shape = weights, rank, x.shape
        ctx.wide = blocks[0].dtype
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        folded, *factors = ctx.saved_tensors
        dys = [dy.reshape(len(folded), -1, dy.shape[-1]) for dy in grads]
        blocks = [wide_bmm(folded.mT, dy, ctx.wide)[:, : ctx.rank] for dy in dys]
        dx = None
        if ctx.needs_input_grad[0]:
            dfolded = torch.bmm(dys[0], factors[0].mT)
            for dy, d in zip(dys[1:], factors[1:], strict=True):
                dfolded.baddbmm_(dy, d.mT)
            dx = unfold(dfolded.flatten(0, 1)[:, : ctx.rank], ctx.shape[-1])
            for dy, weight in zip(dys, ctx.weights, strict=True):
                dx.addmm_(dy.view(-1, dy.shape[-1]), weight)
            dx = dx.view(ctx.shape)
        return dx, None, None, *blocks
