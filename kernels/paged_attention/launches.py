"""Launch parameters of paged attention, chosen from sizes alone: nothing here looks at a tensor."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from shoal.kernels.launching import power_of_two

MAX_SPLITS = 64  # the reduction loads a head's partial results at once
LONGEST_SPLIT = 8192  # keys: one long row among many short ones must not be a few slow programs
LEAST_SPLIT = 256  # keys, where rows are split to fill the GPU


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How to launch a decode.

    Attributes:
        tile: keys per step of the loop, a power of two, at least 16.
        splits: programs that may share a row's keys, at most ``MAX_SPLITS``; 1: no second launch.
        min_split: keys a program takes at least, so that short rows are not split.
        num_stages: loop steps in flight.
    """

    tile: int
    splits: int
    min_split: int
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """How to launch a prefill.

    Attributes:
        rows_m: rows of a query tile (tokens times the heads of a group), a power of two.
        tile: keys per step of the loop, a power of two, at least 16.
        num_stages: loop steps in flight.
    """

    rows_m: int
    tile: int
    num_warps: int = 8
    num_stages: int = 3


def default_decode_config(
    programs: int, span: int, dim: int, itemsize: int, processors: int
) -> DecodeConfig:
    """Launch parameters of a decode.

    Args:
        programs: rows times kv heads, the programs there are without splitting.
        span: keys that the longest row can see.
        dim: head dimension, padded to a power of two.
        itemsize: bytes per element of the cache.
        processors: streaming multiprocessors of the GPU.
    """
    # Swept on an H100: two programs per processor keep its memory busy (32 rows of 8 kv heads took
    # 27 us at 512 keys unsplit and 31 us split, 181 and 201 us at 4,096), so a row is split only
    # where there are fewer, or where few long rows would leave processors idle at the end.
    wanted = 3 * processors // 2
    enough = programs >= wanted
    min_split = 1024 if enough else LEAST_SPLIT
    splits = max(-(-wanted // max(programs, 1)), -(-span // LONGEST_SPLIT))
    splits = max(1, min(splits, -(-span // min_split), MAX_SPLITS))
    # Two tiles of keys and values per stage stay within some 100 KiB: two programs per processor.
    tile = 64 if dim * itemsize <= 256 else 32
    return DecodeConfig(tile=tile, splits=splits, min_split=min_split)


def split_spans(most: int) -> list[int]:
    """Spans of a single row that together launch every variant of a decode of up to ``most`` keys.

    The reduction is compiled for every power of two of splits. One row takes as many splits as any
    number of rows does, and each of these spans twice as many as the one before.
    """
    spans = (LEAST_SPLIT * 2**doubled + 1 for doubled in range(most.bit_length()))
    return [span for span in spans if span <= most]


def default_prefill_config(
    tokens: int, rows: int, group: int, dim: int, itemsize: int
) -> PrefillConfig:
    """Launch parameters of a prefill of ``tokens`` tokens in ``rows`` rows.

    Args:
        group: query heads that share a kv head.
        dim: head dimension, padded to a power of two.
        itemsize: bytes per element.
    """
    # Two warp groups of 64 rows each, as Hopper's matrix units take them: within 2 % of the best of
    # a sweep for 8 x 1024 tokens (H100), but 4 warps are 14 % faster for 1 x 2048. Smaller tiles
    # for short chunks, which would leave most of 128 rows empty: not swept.
    least = power_of_two(group, 16)
    if itemsize > 2:  # plain arithmetic: for checks against the CPU, not for speed
        return PrefillConfig(max(least, 32), tile=32, num_warps=4, num_stages=2)
    if -(-tokens // max(rows, 1)) * group <= 64:
        return PrefillConfig(max(least, 64), tile=64 if dim <= 128 else 32, num_warps=4)
    return PrefillConfig(max(least, 128), tile=64, num_stages=3 if dim <= 128 else 2)


@functools.cache
def processors(device: torch.device) -> int:
    if device.type == "cpu":  # interpreted, one program after the other
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def row_class(rows: int) -> int:
    """The size that a prefill of so many rows is compiled for: each is another compilation.

    A program loads 256 starts, two for each thread, as fast as one.
    """
    return power_of_two(rows, 256)
