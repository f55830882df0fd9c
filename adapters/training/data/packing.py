"""Packing: several short records in one row, none of which sees another. No torch.

Records are laid in the epoch's random order into the first open row that has room. Sorting them by
length first would fill rows a little better, and put records of like length together in every
epoch; random rows keep a step's records as independent as unpacked ones.
"""

from collections.abc import Iterable, Sequence

from shoal.adapters.training.data.example import Example

# Rows that may still be filled; more of them fill better, and cost time per record.
_OPEN_ROWS = 64


def plan_rows(lengths: Sequence[int], order: Iterable[int], capacity: int) -> list[tuple[int, ...]]:
    """Which examples share a row: first fit, in ``order``, among the newest open rows.

    Args:
        lengths: tokens of each example, each at most ``capacity``.
        order: indices of examples, each once.
        capacity: tokens of a row.

    Returns:
        The rows in the order in which they were opened, so that long and short ones mix.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in order:
        length = lengths[index]
        assert length <= capacity, f"example {index} has {length} tokens, a row {capacity}"
        first_open = max(0, len(rows) - _OPEN_ROWS)
        for row in range(first_open, len(rows)):
            if room[row] >= length:
                rows[row].append(index)
                room[row] -= length
                break
        else:
            rows.append([index])
            room.append(capacity - length)
    return [tuple(row) for row in rows]


def join(examples: Sequence[Example]) -> Example:
    """Lay examples end to end in one row.

    The first token of a record has nothing of its own before it that could predict it, so it is
    not supervised, as in a row of its own.
    """
    ids: list[int] = []
    supervised: list[bool] = []
    starts: list[int] = []
    for example in examples:
        starts += [len(ids) + start for start in example.starts]
        ids += example.input_ids
        supervised += example.supervised
    for start in starts:
        supervised[start] = False
    return Example(tuple(ids), tuple(supervised), tuple(starts))


def fill_of(lengths: Sequence[int], rows: Sequence[Sequence[int]], capacity: int) -> float:
    """Share of the rows' room that holds tokens."""
    return sum(lengths[index] for row in rows for index in row) / (len(rows) * capacity)
