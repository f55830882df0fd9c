"""In which order a run sees its examples, and which of them share a row. No torch.

Both are functions of the seed alone, so that a resumed run finds its place by skipping.
"""

import random
from collections.abc import Iterator, Sequence

from shoal.adapters.training.data.packing import plan_rows


def order_of(num_examples: int, seed: int) -> Iterator[int]:
    """Endless order of examples: a fresh permutation every epoch, decided by the seed alone."""
    epoch = 0
    while True:
        yield from _epoch(num_examples, seed, epoch)
        epoch += 1


def row_order(lengths: Sequence[int], seed: int, capacity: int | None) -> Iterator[tuple[int, ...]]:
    """Endless order of rows, each the indices of the examples in it.

    Args:
        lengths: tokens of each example.
        seed: decides everything.
        capacity: tokens of a packed row, at least the longest example; None: one example a row.

    Yields:
        Rows; every epoch holds each example once, and a row never spans two epochs.
    """
    if capacity is None:
        yield from ((index,) for index in order_of(len(lengths), seed))
    epoch = 0
    while capacity is not None:
        yield from plan_rows(lengths, _epoch(len(lengths), seed, epoch), capacity)
        epoch += 1


def _epoch(num_examples: int, seed: int, epoch: int) -> list[int]:
    indices = list(range(num_examples))
    random.Random(f"{seed}:{epoch}").shuffle(indices)
    return indices
