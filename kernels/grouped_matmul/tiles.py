"""Which neighbouring tokens share an adapter's matrix, decided with integers on the host.

Pure: imports no tensor library.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class TilePlan(NamedTuple):
    """Runs of neighbouring tokens with one address, cut to at most ``tile_tokens`` each.

    ``starts[i]`` is a tile's first token, ``lengths[i]`` its number of tokens; a length of 0 is
    padding. Tokens in no tile have no adapter.
    """

    starts: list[int]
    lengths: list[int]
    tile_tokens: int


def make_tiles(
    runs: Iterable[tuple[int, int]], tile_tokens: int = 16, pad_to: int | None = None
) -> TilePlan:
    """Cut runs of tokens into tiles.

    Args:
        runs: ``(address, tokens)`` in token order; an address of -1 means no adapter. Any
            integer that is equal just for equal adapters serves as the address. Neighbouring
            runs of one address are merged.
        tile_tokens: most tokens in a tile, a power of two of at least 16.
        pad_to: append empty tiles up to this number, so that a captured graph fits every plan.

    Raises:
        ValueError: ``tile_tokens`` is not as required, or more than ``pad_to`` tiles are needed.
    """
    if tile_tokens < 16 or tile_tokens & (tile_tokens - 1):
        raise ValueError(f"tile_tokens: expected a power of two of at least 16, got {tile_tokens}")
    merged: list[list[int]] = []  # address, first token, tokens
    token = 0
    for address, tokens in runs:
        if merged and merged[-1][0] == address:
            merged[-1][2] += tokens
        elif tokens > 0:
            merged.append([address, token, tokens])
        token += tokens
    plan = TilePlan([], [], tile_tokens)
    for address, first, tokens in merged:
        if address < 0:
            continue
        for start in range(first, first + tokens, tile_tokens):
            plan.starts.append(start)
            plan.lengths.append(min(tile_tokens, first + tokens - start))
    if pad_to is not None:
        missing = pad_to - len(plan.starts)
        if missing < 0:
            raise ValueError(f"pad_to: {len(plan.starts)} tiles are needed, got {pad_to}")
        plan.starts.extend([0] * missing)
        plan.lengths.extend([0] * missing)
    return plan
