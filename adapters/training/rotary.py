"""Rotary embeddings in three kernels each way: transformers spells them out in five, and six back.

A decoder's attention calls ``apply_rotary_pos_emb`` of its own module, a global of its ``forward``.
Where that is the usual one, an attention gets a ``forward`` of the same code that calls another.
"""

import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

_NAME = "apply_rotary_pos_emb"


def fuse_rotary(model: nn.Module) -> int:
    """Let attentions rotate with ``rotate``, in place; how many it was.

    Whatever rotates otherwise (pairs of neighbours, say) or is not found stays as it is.
    """
    count = 0
    for module in model.modules():
        forward = type(module).forward
        if not isinstance(forward, FunctionType) or "forward" in vars(module):
            continue
        if _NAME not in forward.__code__.co_names or not _usual(forward.__globals__.get(_NAME)):
            continue
        surroundings = {**forward.__globals__, _NAME: rotate}
        code, defaults, cells = forward.__code__, forward.__defaults__, forward.__closure__
        same = FunctionType(code, surroundings, forward.__name__, defaults, cells)
        same.__kwdefaults__ = forward.__kwdefaults__
        module.forward = MethodType(same, module)
        count += 1
    return count


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """``x · cos + (-x₂, x₁) · sin`` of q and k, whose halves in the last dimension are x₁ and x₂.

    Args:
        q, k: ``(rows, heads, length, d)``; what is returned lies in memory as they do.
        cos, sin: ``(rows or 1, length, d)``, constants.
        unsqueeze_dim: where the dimension of heads is.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotated.apply(q, cos, sin), _Rotated.apply(k, cos, sin)  # type: ignore[no-untyped-call]


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = sin.chunk(2, dim=-1)
        return _turned(x, cos, first, second, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, dim=-1)
        # The transposed matrix: it turns the other way, and the sines change places.
        return _turned(grads[0], cos, second, first, -1), None, None


def _turned(x: Tensor, cos: Tensor, first: Tensor, second: Tensor, sign: int) -> Tensor:
    """``(x₁ cos₁ - sign · x₂ first, x₂ cos₂ + sign · x₁ second)``."""
    x1, x2 = x.chunk(2, dim=-1)
    out = x * cos
    y1, y2 = out.chunk(2, dim=-1)
    y1.addcmul_(x2, first, value=-sign)
    y2.addcmul_(x1, second, value=sign)
    return out


@torch.no_grad()
def _usual(theirs: Callable[..., Any] | None) -> bool:
    """Whether it takes what ``rotate`` takes, and gives the same."""
    if not isinstance(theirs, FunctionType):
        return False
    if list(inspect.signature(theirs).parameters) != ["q", "k", "cos", "sin", "unsqueeze_dim"]:
        return False
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn((2, heads, 3, 8), generator=generator) for heads in (4, 2))
    cos, sin = (torch.randn((2, 3, 8), generator=generator) for _ in range(2))
    wanted, found = theirs(q, k, cos, sin), rotate(q, k, cos, sin)
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(wanted, found, strict=True))
