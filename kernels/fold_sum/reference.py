"""What ``fold_sum`` means, in plain torch; also how it runs on a CPU. Owns no launch logic."""

from __future__ import annotations

import torch
from torch import Tensor


def fold_sum_reference(x: Tensor, ranks: Tensor, columns: int) -> Tensor:
    """See ``shoal.kernels.fold_sum.kernel.fold_sum``; any device. Loops over distinct ranks."""
    out = x.new_zeros((x.shape[0], columns), dtype=torch.float32)
    for rank in sorted(set(ranks.tolist()) - {0}):
        rows = (ranks == rank).nonzero().squeeze(1)
        out[rows, :rank] = _fold(x[rows], rank)
    return out


def _fold(x: Tensor, rank: int) -> Tensor:
    tokens, width = x.shape
    whole = width - width % rank
    folds = x[:, :whole].reshape(tokens, whole // rank, rank).sum(1, dtype=torch.float32)
    if whole < width:
        folds[:, : width - whole] += x[:, whole:]
    return folds
