"""Which neighbouring tokens share an adapter's matrix, decided with integers on the host.

Pure: imports no tensor library.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

# Tokens in a tile at most: the rows of the small matrix instructions.
TILE_TOKENS = 16


class Run(NamedTuple):
    """Neighbouring tokens with one adapter: its record's start in the arena, and its rank."""

    start: int
    length: int
    address: int
    rank: int


class TilePlan(NamedTuple):
    """Runs cut to at most ``TILE_TOKENS`` tokens, one entry of each list for each tile.

    Tokens in no tile have no adapter. A tile of length 0 is padding.
    """

    starts: list[int]
    lengths: list[int]
    addresses: list[int]
    ranks: list[int]


def make_tiles(runs: Iterable[tuple[int, int, int, int]]) -> TilePlan:
    """Cut ``Run``s, in ascending order and disjoint, into tiles; neighbours of one address join."""
    plan = TilePlan([], [], [], [])
    starts, lengths, addresses, ranks = plan
    previous = end = -1
    for start, length, address, rank in runs:
        if address == previous and start == end and length and lengths[-1] < TILE_TOKENS:
            taken = min(length, TILE_TOKENS - lengths[-1])
            lengths[-1] += taken
            start, length, end = start + taken, length - taken, end + taken
        for first in range(start, start + length, TILE_TOKENS):
            starts.append(first)
            lengths.append(min(TILE_TOKENS, start + length - first))
            addresses.append(address)
            ranks.append(rank)
        if length:
            previous, end = address, start + length
    return plan


def most_tiles(tokens: int, rows: int) -> int:
    """Tiles that at most ``tokens`` tokens in ``rows`` runs are cut into: what a grid must hold."""
    return min(tokens, tokens // TILE_TOKENS + rows)
