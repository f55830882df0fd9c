"""What ``core_apply`` means, in plain torch; also how it runs on a CPU. Owns no launch logic."""

from __future__ import annotations

import torch
from torch import Tensor


def core_apply_reference(
    y: Tensor, h: Tensor, arena: Tensor, addresses: Tensor, ranks: Tensor, basis: Tensor
) -> None:
    """See ``shoal.kernels.core_apply.kernel.core_apply``; float32 accumulation, any device.

    Vectorised over tokens and adapters; the only loop is over the *distinct ranks*. A rank or an
    address outside ``h``, ``basis`` or ``arena`` raises torch's own error.
    """
    rows = (addresses >= 0).nonzero().squeeze(1)
    if rows.numel() == 0:
        return
    everyone = rows.numel() == y.shape[0]
    used_ranks = ranks if everyone else ranks[rows]
    distinct = sorted(set(used_ranks.tolist()))
    if everyone and len(distinct) == 1:
        mixed = _mix(h, arena, addresses, distinct[0])
    else:
        mixed = h.new_zeros((y.shape[0], max(distinct)), dtype=torch.float32)
        for rank in distinct:
            same = rows[used_ranks == rank]
            mixed[same, :rank] = _mix(h[same], arena, addresses[same], rank)
    columns = basis[:, : mixed.shape[1]].float().t()
    if everyone and y.dtype == torch.float32:
        y.addmm_(mixed, columns)
    else:
        delta = (mixed if everyone else mixed[rows]) @ columns
        y[rows] = (y[rows].float() + delta).to(y.dtype)


def _mix(h: Tensor, arena: Tensor, addresses: Tensor, rank: int) -> Tensor:
    """``h[t, :rank] @ R_tᵀ`` for tokens of one rank, float32 ``(tokens, rank)``."""
    # Every address starts a row of this overlapping view: the gather needs no index arithmetic.
    matrices = arena.as_strided((arena.numel() - rank * rank + 1, rank * rank), (1, 1))
    gathered = matrices.index_select(0, addresses).view(-1, rank, rank).float()
    return torch.bmm(gathered, h[:, :rank, None].float()).squeeze(2)
