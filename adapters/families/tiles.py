"""Which tokens of a step use which adapter record, as index tensors built once per step.

Owns ``Tokens`` (the tokens of one group within the step), ``Tiling`` (those tokens cut into tiles
that each use one record) and ``Records`` (reading records out of the bank's arena). What is
computed with a record is the business of the families.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Tokens per tile. A segment is cut into tiles of the largest size and one padded tile for what is
# left, so that at most 3/4 of a padded tile is waste and a step has at most five passes per part.
TILE_TOKENS = (1, 4, 16, 64, 256)

# Upper bound of adapter data gathered at a time; more tiles are worked off in turns.
GATHER_BYTES = 64 << 20


class Segment(NamedTuple):
    """Adjacent tokens of a step that use one adapter: ``start`` counts in the step's tokens."""

    unit: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of one group, in ascending order: a range, or an index when they are scattered.

    Attributes:
        start: first token of the range; unused with an index.
        count: number of tokens.
        index: ``(count,)`` int64 positions, or None for ``start .. start + count``.
    """

    start: int
    count: int
    index: Tensor | None

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device) -> "Tokens":
        """The tokens of ``segments``, which must be in ascending order and disjoint."""
        count = sum(segment.length for segment in segments)
        first, last = segments[0], segments[-1]
        if last.start + last.length - first.start == count:
            return cls(first.start, count, None)
        positions = [t for s in segments for t in range(s.start, s.start + s.length)]
        return cls(0, count, index_tensor(positions, device))

    @classmethod
    def covering(
        cls, segments: Sequence[Segment], device: torch.device
    ) -> "tuple[Tokens, Tensor | None]":
        """A range to work on in place of scattered tokens, and where they are within it.

        Where the tokens are at least half of the range they span, a narrow product over all of it
        costs less than copying them out and back. Otherwise it is the tokens themselves.
        """
        tokens = cls.of(segments, device)
        first, last = segments[0], segments[-1]
        span = last.start + last.length - first.start
        if tokens.index is None or span > 2 * tokens.count:
            return tokens, None
        return cls(first.start, span, None), tokens.index - first.start

    def take(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Their rows of ``tensor``: a view where they are a range and the dtype is the same."""
        if self.index is not None:
            part = tensor.index_select(0, self.index)
        elif self.count == tensor.shape[0]:
            part = tensor
        else:
            part = tensor.narrow(0, self.start, self.count)
        return part if dtype is None else part.to(dtype)

    def put(self, tensor: Tensor, part: Tensor) -> None:
        """Write back what ``take(tensor)`` returned; nothing to do when that was a view."""
        if self.index is not None:
            tensor.index_copy_(0, self.index, part.to(tensor.dtype))
        elif part.dtype != tensor.dtype:
            tensor.narrow(0, self.start, self.count).copy_(part)

    def write(self, tensor: Tensor, values: Tensor) -> None:
        """Make ``values`` their rows of ``tensor``."""
        if self.index is not None:
            tensor.index_copy_(0, self.index, values.to(tensor.dtype))
        else:
            tensor.narrow(0, self.start, self.count).copy_(values)

    def add(self, tensor: Tensor, delta: Tensor) -> None:
        """Add ``delta`` to their rows of ``tensor``, rounding once."""
        if self.index is not None and delta.dtype == tensor.dtype:
            tensor.index_add_(0, self.index, delta)
        elif self.index is not None:
            tensor.index_copy_(0, self.index, self.take(tensor).add_(delta))
        else:
            self.take(tensor).add_(delta)


@dataclass(frozen=True, slots=True)
class TileBatch:
    """Tiles of one size.

    Attributes:
        size: tokens per tile.
        units: ``(tiles,)`` int64, the first arena unit of each tile's record.
        index: ``(tiles * size,)`` int64 positions among the group's tokens (padding repeats a
            token of the same segment), or None when the tiles are the tokens in order.
        unit: the record of all tokens when there is only one, read in place; else None.
    """

    size: int
    units: Tensor
    index: Tensor | None
    unit: int | None = None

    @property
    def tiles(self) -> int:
        return self.units.shape[0]


@dataclass(frozen=True, slots=True)
class Tiling:
    """The tokens of one group cut into tiles that each use one record.

    Attributes:
        batches: by tile size.
        inverse: ``(tokens,)`` int64, where each token's result is in the batches' concatenated
            results, or None when that is the tokens' own order.
    """

    batches: tuple[TileBatch, ...]
    inverse: Tensor | None

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device) -> "Tiling":
        """Cut ``segments``, the whole of one group in ascending order."""
        segments = merged(segments)
        count = sum(segment.length for segment in segments)
        if len({segment.unit for segment in segments}) == 1:
            unit = segments[0].unit
            return cls((TileBatch(count, index_tensor([unit], device), None, unit),), None)
        tiles: dict[int, list[tuple[int, int, int]]] = {size: [] for size in TILE_TOKENS}
        position = 0
        for segment in segments:
            for size, length in _cut(segment.length):
                tiles[size].append((segment.unit, position, length))
                position += length
        batches: list[TileBatch] = []
        inverse = [0] * count
        place = 0
        for size in TILE_TOKENS:
            index: list[int] = []
            for _, first, length in tiles[size]:
                start = place + len(index)
                inverse[first : first + length] = range(start, start + length)
                index.extend(range(first, first + length))
                index.extend([first + length - 1] * (size - length))
            if index:
                units = index_tensor([unit for unit, _, _ in tiles[size]], device)
                in_order = index == list(range(count))
                batches.append(
                    TileBatch(size, units, None if in_order else index_tensor(index, device))
                )
            place += len(index)
        in_order = inverse == list(range(place))
        return cls(tuple(batches), None if in_order else index_tensor(inverse, device))


class Records:
    """Reads adapter records out of the arena without index arithmetic.

    Limit: the views overlap, so they are for reading only.
    """

    def __init__(self, arena: Tensor, unit_elements: int) -> None:
        self.arena = arena
        self.unit_elements = unit_elements

    def gather(self, units: Tensor, offset: int, length: int) -> Tensor:
        """``(len(units), length)``: elements ``offset .. offset + length`` of each record."""
        stride = self.unit_elements
        rows = (self.arena.numel() - offset - length) // stride + 1
        view = self.arena.as_strided((rows, length), (stride, 1), offset)
        return view.index_select(0, units)

    def view(self, unit: int, offset: int, length: int) -> Tensor:
        """``(1, length)``: the same of one record, in place."""
        return self.arena.narrow(0, unit * self.unit_elements + offset, length).unsqueeze(0)


def gather_whole(tiling: Tiling, records: Records, elements: int) -> list[Tensor] | None:
    """Each batch's whole records, ``(tiles, elements)``, or None when they exceed the bound.

    Small records are cheaper to read once per step, in long runs, than once per layer and module.
    """
    tiles = sum(batch.tiles for batch in tiling.batches)
    if tiles * elements * records.arena.element_size() > GATHER_BYTES:
        return None
    return [
        records.gather(batch.units, 0, elements)
        if batch.unit is None
        else records.view(batch.unit, 0, elements)
        for batch in tiling.batches
    ]


def apply_tiles(
    tiling: Tiling,
    records: Records,
    inputs: Tensor,
    offset: int,
    length: int,
    compute: Callable[[Tensor, Tensor], Tensor],
    whole: Sequence[Tensor] | None = None,
    single: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Run ``compute`` on every tile with its record, in token order.

    Args:
        inputs: ``(tokens, k)`` of the group.
        offset, length: the part of each record that is needed.
        compute: ``(inputs (tiles, size, k), data (tiles, length)) -> (tiles, size, n)``.
        whole: from ``gather_whole``, where that has been done.
        single: ``(inputs (tiles, 1, k), units (tiles,)) -> (tiles, 1, n)``: used for tiles of one
            token in place of a gather and ``compute``.

    Returns:
        ``(tokens, n)``. At most ``GATHER_BYTES`` of records (or one) are gathered at a time.
    """
    results = []
    per_turn = max(1, GATHER_BYTES // (length * records.arena.element_size()))
    for i, batch in enumerate(tiling.batches):
        tokens = inputs if batch.index is None else inputs.index_select(0, batch.index)
        tiled = tokens.view(batch.tiles, batch.size, -1)
        if whole is not None:
            results.append(compute(tiled, whole[i].narrow(1, offset, length)))
        elif batch.unit is not None:
            results.append(compute(tiled, records.view(batch.unit, offset, length)))
        elif single is not None and batch.size == 1:
            results.append(single(tiled, batch.units))
        elif batch.tiles <= per_turn:
            results.append(compute(tiled, records.gather(batch.units, offset, length)))
        else:
            for first in range(0, batch.tiles, per_turn):
                units = batch.units[first : first + per_turn]
                data = records.gather(units, offset, length)
                results.append(compute(tiled[first : first + per_turn], data))
    flat = [result.flatten(0, 1) for result in results]
    joined = flat[0] if len(flat) == 1 else torch.cat(flat)
    return joined if tiling.inverse is None else joined.index_select(0, tiling.inverse)


def merged(segments: Sequence[Segment]) -> list[Segment]:
    """Join neighbours that use the same record; ``start`` of the first is kept."""
    joined: list[Segment] = []
    for segment in segments:
        if joined and joined[-1].unit == segment.unit:
            joined[-1] = joined[-1]._replace(length=joined[-1].length + segment.length)
        else:
            joined.append(segment)
    return joined


def index_tensor(values: Sequence[int], device: torch.device) -> Tensor:
    """``values`` as int64 on ``device``, without waiting for the device."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=torch.int64)
    pinned = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


def _cut(length: int) -> list[tuple[int, int]]:
    """``(tile size, tokens in it)`` of each tile of a segment."""
    largest = TILE_TOKENS[-1]
    tiles = [(largest, largest)] * (length // largest)
    rest = length % largest
    if rest:
        tiles.append((next(size for size in TILE_TOKENS if size >= rest), rest))
    return tiles
