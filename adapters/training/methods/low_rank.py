"""``x Wᵀ + s·(x Aᵀ) Bᵀ`` as autograd sees it: one function, forward and back.

The adapter's small product comes first and the base's adds onto it, forward and backward: a product
that large hides reading what it adds to, and nothing else passes over values of a linear's width.

The rows of a 16-bit matrix must begin at multiples of 16 bytes, or a GPU multiplies it several
times slower. So ranks are filled up with zeros there; gradients are of the rank asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_BYTES = 16


def padded_rank(rank: int, dtype: torch.dtype) -> int:
    """The rank to multiply with: a multiple of 8 for 16-bit types, as it is for others."""
    step = _BYTES // dtype.itemsize if dtype.itemsize == 2 else 1
    return -(-rank // step) * step


def padded(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``x`` in the corner of a tensor of ``shape``, zero elsewhere; not copied where it fits."""
    if x.shape == shape:
        return x.to(dtype)
    out = torch.zeros(shape, dtype=dtype, device=x.device)
    out[tuple(slice(size) for size in x.shape)] = x
    return out


def scaled_bmm(x: Tensor, y: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """``scale · x y`` of batches in one kernel, into ``out`` if there is one."""
    if out is None:
        out = x.new_empty((*x.shape[:2], y.shape[2]))
    return out.baddbmm_(x, y, beta=0, alpha=scale)


def wide_bmm(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """``x y`` of batches in ``dtype``; of 16-bit factors on a GPU in one kernel, rounded once."""
    if x.is_cuda and x.element_size() == 2 and dtype == torch.float32:
        return torch.bmm(x, y, out_dtype=dtype)
    return torch.bmm(x, y).to(dtype)


def low_rank_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scale: float,
    biases: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """``x Wᵀ + s·(x Aᵀ) Bᵀ + bias`` of each linear, with the ``A`` and ``B`` of each row's lane.

    Args:
        x: ``(lanes·rows, …, d_in)``, the input of all.
        weights: of each linear ``W (d_out, d_in)``, frozen; at least one.
        a: of each ``A (lanes, r, d_in)``, usually float32; products are in x's dtype.
        b: of each ``B (lanes, d_out, r)``; may be frozen.
        scale: ``s``.
        biases: of each ``(d_out,)`` or None, frozen; None: none has one.

    Returns:
        Of each ``(lanes·rows, …, d_out)`` in x's dtype.
    """
    frozen = tuple(weights), tuple(biases or (None,) * len(weights))
    outs: tuple[Tensor, ...] = _LowRank.apply(x, *frozen, scale, *a, *b)  # type: ignore[no-untyped-call]
    return outs


@dataclass(frozen=True, slots=True)
class _Part:
    """Where a linear's rank lies among those of all: ``own`` counts, up to ``whole`` is zero."""

    own: slice
    whole: slice


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: tuple[Tensor, ...],
        biases: tuple[Tensor | None, ...],
        scale: float,
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        a, b = factors[: len(weights)], factors[len(weights) :]
        lanes, dtype = len(a[0]), x.dtype
        parts, width = [], 0
        for one in a:
            begin, width = width, width + padded_rank(one.shape[1], dtype)
            parts.append(_Part(slice(begin, begin + one.shape[1]), slice(begin, width)))
        if len(a) == 1:
            down = padded(a[0], (lanes, width, x.shape[-1]), dtype)
        else:
            full = width == sum(one.shape[1] for one in a)
            room = torch.empty if full else torch.zeros
            down = room((lanes, width, x.shape[-1]), dtype=dtype, device=x.device)
            for one, part in zip(a, parts, strict=True):
                down[:, part.own] = one
        flat = x.reshape(-1, x.shape[-1])
        h = scaled_bmm(flat.view(lanes, -1, flat.shape[1]), down.mT, scale)
        ups, outs = [], []
        for weight, bias, one, part in zip(weights, biases, b, parts, strict=True):
            rank = part.whole.stop - part.whole.start
            up = padded(one, (*one.shape[:2], rank), dtype)
            y = x.new_empty((*x.shape[:-1], up.shape[1]))
            torch.bmm(h[:, :, part.whole], up.mT, out=y.view(lanes, -1, up.shape[1]))
            y.view(-1, up.shape[1]).addmm_(flat, weight.T)
            outs.append(y if bias is None else y.add_(bias))
            ups.append(up)
        ctx.save_for_backward(flat, h, down, *ups)
        ctx.weights, ctx.scale, ctx.parts, ctx.shape = weights, scale, parts, x.shape
        ctx.wide = a[0].dtype
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        flat, h, down, *ups = ctx.saved_tensors
        lanes = len(down)
        dys = [dy.reshape(lanes, -1, dy.shape[-1]) for dy in grads]
        dh = torch.empty_like(h)
        for dy, up, part in zip(dys, ups, ctx.parts, strict=True):
            scaled_bmm(dy, up, ctx.scale, out=dh[:, :, part.whole])
        db: list[Tensor | None] = []
        for dy, part, wanted in zip(dys, ctx.parts, ctx.needs_input_grad[-len(dys) :], strict=True):
            rank = part.own.stop - part.own.start
            own = h[:, :, part.whole]
            db.append(wide_bmm(dy.mT, own, ctx.wide)[..., :rank] if wanted else None)
        da = wide_bmm(dh.mT, flat.view(lanes, -1, flat.shape[1]), ctx.wide)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.bmm(dh, down).view(flat.shape)
            for dy, weight in zip(dys, ctx.weights, strict=True):
                dx.addmm_(dy.view(-1, dy.shape[-1]), weight)
            dx = dx.view(ctx.shape)
        return dx, None, None, None, *(da[:, part.own] for part in ctx.parts), *db
