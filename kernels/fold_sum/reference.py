"""What ``fold_sum`` means, in plain torch; also how it runs on a CPU. Owns no launch logic."""

from __future__ import annotations

import torch
from torch import Tensor


def fold_sum_reference(x: Tensor, rank: int) -> Tensor:
    """See ``shoal.kernels.fold_sum.kernel.fold_sum``; any device."""
    tokens, width = x.shape
    whole = width - width % rank
    folds = x[:, :whole].reshape(tokens, whole // rank, rank).sum(1, dtype=torch.float32)
    if whole < width:
        folds[:, : width - whole] += x[:, whole:]
    return folds
