"""What ``shrink`` and ``expand`` mean, in plain torch; also how they run on a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shoal.kernels.grouped_matmul.tiles import TILE_TOKENS


def shrink_reference(
    x: Tensor,
    arena: Tensor,
    tiles: tuple[Tensor, Tensor, Tensor, Tensor],
    out: Tensor,
    *,
    modules: int,
    scale: int,
) -> None:
    """See ``shoal.kernels.grouped_matmul.kernel.shrink``; float32 sums, any device.

    Vectorised over tiles; the only loops are over the distinct ranks and over "tiles of one
    token" and "longer tiles". An address outside the arena raises torch's own error.
    """
    for rank, addresses, tokens, live in _alike(tiles):
        n = modules * rank
        matrices = _gather(arena, addresses + rank * scale, n, x.shape[1])
        products = torch.bmm(x[tokens].float(), matrices.transpose(1, 2))
        out[:, :n][tokens[live]] = products[live].to(out.dtype)


def expand_reference(
    x: Tensor,
    arena: Tensor,
    tiles: tuple[Tensor, Tensor, Tensor, Tensor],
    out: Tensor,
    *,
    widths: Sequence[int],
    scale: int,
) -> None:
    """See ``shoal.kernels.grouped_matmul.kernel.expand``; otherwise as ``shrink_reference``."""
    for rank, addresses, tokens, live in _alike(tiles):
        matrices = _gather(arena, addresses + rank * scale, rank, sum(widths))
        inputs = x[tokens].float()
        at = tokens[live]
        start = 0
        for module, width in enumerate(widths):
            own = inputs[..., module * rank : (module + 1) * rank]
            columns = slice(start, start + width)
            start += width
            products = torch.bmm(own, matrices[..., columns])[live]
            out[:, columns][at] = (out[:, columns][at].float() + products).to(out.dtype)


def _alike(
    tiles: tuple[Tensor, Tensor, Tensor, Tensor],
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Tiles of one rank and about one length: rank, addresses, tokens ``(tiles, size)``, live."""
    starts, lengths, addresses, ranks = tiles
    used = lengths > 0
    for rank in sorted(set(ranks[used].tolist())):
        same = used & (ranks == rank)
        single = same & (lengths == 1)
        for chosen, size in ((single, 1), (same & ~single, TILE_TOKENS)):
            if bool(chosen.any()):
                offsets = torch.arange(size, device=starts.device)
                live = offsets < lengths[chosen][:, None]
                tokens = starts[chosen].long()[:, None] + offsets
                yield rank, addresses[chosen], tokens.masked_fill(~live, 0), live


def _gather(arena: Tensor, addresses: Tensor, rows: int, width: int) -> Tensor:
    """``(tiles, rows, width)`` float32, one dense matrix per address."""
    # Every address starts a row of this overlapping view: no index arithmetic.
    size = rows * width
    view = arena.as_strided((arena.numel() - size + 1, size), (1, 1))
    return view.index_select(0, addresses).view(-1, rows, width).float()
