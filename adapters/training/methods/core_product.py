"""``x Wᵀ + s·((x Aᵀ) Rᵀ) Bᵀ`` as autograd sees it: one function, forward and back.

Kept for the backward pass is ``h = x Aᵀ``, of the rank's width; neither x nor y. The adapter's
small products come first and the base's add onto them. Those with ``R`` are float32, as ``R`` is.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Tokens that one product of the gradient of R sums over: on a GPU it is one block's work.
_PIECES = (256, 128, 64)


def core_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    cores: Sequence[Tensor],
    scale: float,
) -> tuple[Tensor, ...]:
    """``x Wᵀ + s·((x Aᵀ) Rᵀ) Bᵀ + bias`` of each linear, with the ``R`` of each row's lane.

    Args:
        x: ``(lanes·rows, …, d_in)``, the input of all.
        weights: of each linear ``W (d_out, d_in)``, frozen; at least one.
        biases: of each ``(d_out,)`` or None, frozen.
        downs: of each ``A (k, d_in)`` as x; frozen; ``k`` may exceed the rank by rows of zeros.
        ups: of each ``B (d_out, k)``, likewise by columns.
        cores: of each ``R (lanes, r, r)``, float32 or wider.
        scale: ``s``.

    Returns:
        Of each ``(lanes·rows, …, d_out)`` in x's dtype.
    """
    down = downs[0] if len(downs) == 1 else torch.cat(list(downs))
    frozen = tuple(weights), tuple(biases), down, tuple(ups)
    outs: tuple[Tensor, ...] = _Cores.apply(x, *frozen, scale, *cores)  # type: ignore[no-untyped-call]
    return outs


class _Cores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: tuple[Tensor, ...],
        biases: tuple[Tensor | None, ...],
        down: Tensor,
        ups: tuple[Tensor, ...],
        scale: float,
        *cores: Tensor,
    ) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])
        h = flat @ down.T
        matrices = _stacked(cores, ups[0].shape[1], scale)
        z = torch.bmm(_by_linear(h, matrices), matrices.flatten(0, 1).mT)
        z = z.view(len(cores), len(h), -1).to(x.dtype)
        outs = []
        for own, weight, bias, up in zip(z, weights, biases, ups, strict=True):
            y = x.new_empty((*x.shape[:-1], len(up)))
            rows = y.view(-1, len(up))
            torch.mm(own, up.T, out=rows)
            rows.addmm_(flat, weight.T)
            outs.append(y if bias is None else y.add_(bias))
        ctx.save_for_backward(h, matrices)
        ctx.weights, ctx.down, ctx.ups, ctx.scale = weights, down, ups, scale
        ctx.rank, ctx.shape = cores[0].shape[1], x.shape
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        h, matrices = ctx.saved_tensors
        count, lanes, width, _ = matrices.shape
        dys = [dy.reshape(-1, dy.shape[-1]) for dy in grads]
        dz = h.new_empty((count, len(h), width))
        for own, dy, up in zip(dz, dys, ctx.ups, strict=True):
            torch.mm(dy, up, out=own)
        wide = dz.to(matrices.dtype).view(count * lanes, -1, width)
        dcores = _summed_outer(wide, _by_linear(h, matrices)).mul_(ctx.scale)
        dcores = dcores.view(matrices.shape)[:, :, : ctx.rank, : ctx.rank]
        dx = None
        if ctx.needs_input_grad[0]:
            dh = torch.bmm(wide, matrices.flatten(0, 1)).view(count, len(h), width)
            dx = _dense(dh.transpose(0, 1), h.dtype).view(h.shape) @ ctx.down
            for dy, weight in zip(dys, ctx.weights, strict=True):
                dx.addmm_(dy, weight)
            dx = dx.view(ctx.shape)
        return dx, *(None,) * 5, *dcores


def _stacked(cores: Sequence[Tensor], width: int, scale: float) -> Tensor:
    """``s·R`` of all linears, ``(linears, lanes, width, width)``: beyond the rank zero."""
    own = cores[0][None] if len(cores) == 1 else torch.stack(list(cores))
    more = width - own.shape[-1]
    return (F.pad(own, (0, more, 0, more)) if more else own) * scale


def _by_linear(h: Tensor, matrices: Tensor) -> Tensor:
    """``(n, linears·width)`` as ``(linears·lanes, n / lanes, width)``, in the matrices' dtype."""
    count, lanes, width, _ = matrices.shape
    each = h.view(lanes, -1, count, width).permute(2, 0, 1, 3)
    return _dense(each, matrices.dtype).view(count * lanes, -1, width)


def _dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in order of its dimensions and another dtype, copied once at most."""
    return x.to(dtype, memory_format=torch.contiguous_format).contiguous()


def _summed_outer(a: Tensor, b: Tensor) -> Tensor:
    """``Σ a[:, t]ᵀ b[:, t]`` of ``(batch, n, width)``: in pieces of ``n``, then over the pieces."""
    batch, n, width = a.shape
    size = next((size for size in _PIECES if n % size == 0), n)
    pieces = torch.bmm(a.view(-1, size, width).mT, b.view(-1, size, width))
    return pieces if size == n else pieces.view(batch, -1, width, width).sum(dim=1)
