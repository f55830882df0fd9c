"""Cross-entropy of many tokens over a large vocabulary, in little memory.

PyTorch's keeps the logits in float32 several times over. Here they stay in the base's dtype, and
float32 exists for some rows at a time, which also fit a GPU's cache.
"""

from typing import Any

import torch
from torch import Tensor

# Values that are float32 at a time: 32 MB.
CHUNK_VALUES = 1 << 23


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """``-log softmax(logits)[label]`` of every row.

    Args:
        logits: ``(n, vocabulary)`` of any float type; computed with in float32.
        labels: ``(n,)`` int64.

    Returns:
        ``(n,)`` float32.
    """
    losses: Tensor = _TokenLosses.apply(logits, labels)  # type: ignore[no-untyped-call]
    return losses


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        rows = _rows(logits)
        totals = torch.cat([part.float().logsumexp(dim=1) for part in torch.split(logits, rows)])
        ctx.save_for_backward(logits, labels, totals)
        return totals - logits.gather(1, labels[:, None])[:, 0].float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, labels, totals = ctx.saved_tensors
        rows = _rows(logits)
        result = torch.empty_like(logits)
        ones = torch.ones_like(totals)[:, None]
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            # softmax - one-hot, times the row's own gradient
            change = logits[part].float().sub_(totals[part, None]).exp_()
            change.scatter_add_(1, labels[part, None], -ones[part])
            result[part] = change.mul_(grad[part, None])
        return result, None


def _rows(logits: Tensor) -> int:
    return max(1, CHUNK_VALUES // logits.shape[1])
