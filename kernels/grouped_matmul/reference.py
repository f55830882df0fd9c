"""What ``grouped_matmul`` means, in plain torch; also how it runs on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_matmul_reference(
    x: Tensor,
    arena: Tensor,
    addresses: Tensor,
    out: Tensor,
    *,
    row_stride: int,
    transposed: bool,
    ranks: Tensor | None,
    tiles: tuple[Tensor, Tensor, int] | None,
) -> None:
    """See ``shoal.kernels.grouped_matmul.kernel.grouped_matmul``; float32 sums, any device.

    Vectorised over tiles; the only loops are over the distinct ranks and over "tiles of one
    token" and "longer tiles". An address outside the arena raises torch's own error.
    """
    if tiles is None:
        starts = torch.arange(x.shape[0], device=x.device)
        lengths = torch.ones_like(starts)
        tile_tokens = 1
    else:
        starts, lengths, tile_tokens = tiles[0].long(), tiles[1], tiles[2]
    stored = out.shape[1] if transposed else x.shape[1]
    used = (lengths > 0) & (addresses[starts] >= 0) if x.shape[0] else lengths > 0
    tile_ranks = None if ranks is None else ranks[starts]
    distinct = [stored] if tile_ranks is None else sorted(set(tile_ranks[used].tolist()))
    for rank in distinct:
        same = used if tile_ranks is None else used & (tile_ranks == rank)
        single = same & (lengths == 1)
        for chosen, size in ((single, 1), (same & ~single, tile_tokens)):
            at = starts[chosen]
            if at.numel():
                offsets = torch.arange(size, device=x.device)
                tokens = at[:, None] + offsets
                live = offsets < lengths[chosen][:, None]
                matrices = _gather(
                    arena, addresses[at], rank, x.shape[1], out.shape[1], row_stride, transposed
                )
                _add_products(x, matrices, tokens, live, out)


def _gather(
    arena: Tensor,
    addresses: Tensor,
    rank: int,
    k: int,
    n: int,
    row_stride: int,
    transposed: bool,
) -> Tensor:
    """``(tiles, k', n')`` matrices, one per address, rank in place of the stored rows."""
    width = k if transposed else n
    span = (rank - 1) * row_stride + width
    # Every address starts a matrix of this overlapping view: no index arithmetic.
    view = arena.as_strided((arena.numel() - span + 1, rank, width), (1, row_stride, 1))
    matrices = view.index_select(0, addresses)
    return matrices.transpose(1, 2) if transposed else matrices


def _add_products(x: Tensor, matrices: Tensor, tokens: Tensor, live: Tensor, out: Tensor) -> None:
    """``out[tokens] += x[tokens] @ matrices`` where ``live``; both ``(tiles, tile tokens)``."""
    k, n = matrices.shape[1:]
    tokens = tokens.masked_fill(~live, 0)
    rows = x[:, :k][tokens].float()
    products = torch.bmm(rows, matrices.float())
    at = tokens[live]
    window = out[:, :n]
    window[at] = (window[at].float() + products[live]).to(out.dtype)
