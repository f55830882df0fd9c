"""Examples -> tensors: padded rows, and for packed ones what keeps their records apart."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.adapters.training.data.example import Example


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples padded on the right.

    Attributes:
        input_ids: ``(rows, length)`` int64.
        supervised: ``(rows, length)`` bool, False on padding.
        num_tokens: tokens that are not padding.
        num_supervised: tokens that count in the loss.
        position_ids: ``(rows, length)`` int64, from 0 in each record; None when not packed.
        segments: ``(rows, length)`` int64, which record of its row a token belongs to, from 1, and
            0 on padding; None when not packed.
    """

    input_ids: Tensor
    supervised: Tensor
    num_tokens: int
    num_supervised: int
    position_ids: Tensor | None = None
    segments: Tensor | None = None


def packed_mask(segments: Tensor) -> Tensor:
    """May query i see key j? ``(rows, 1, length, length)`` bool.

    A token sees itself and what precedes it in its record. Padding sees padding, so that no row of
    the mask is empty (an empty one would make the attention NaN).

    Args:
        segments: ``(rows, length)`` int64, which record of its row a token belongs to.
    """
    length = segments.shape[1]
    causal = torch.ones((length, length), dtype=torch.bool, device=segments.device).tril()
    same = segments[:, :, None] == segments[:, None, :]
    return (same & causal)[:, None]


def collate(
    examples: Sequence[Example],
    pad_id: int,
    device: torch.device,
    *,
    packed: bool = False,
    multiple: int = 1,
) -> Batch:
    """Pad examples on the right to the longest of them.

    Args:
        examples: one a row; those of several records are made by ``join``.
        pad_id: any id of the vocabulary.
        device: where the tensors go.
        packed: give ``position_ids`` and ``segments`` (needed when a row has several records).
        multiple: the length is rounded up to a multiple of this.
    """
    assert packed or all(len(example.starts) == 1 for example in examples)
    length = max(len(example.input_ids) for example in examples)
    length += -length % multiple
    shape = (len(examples), length)
    ids = torch.full(shape, pad_id, dtype=torch.int64)
    supervised = torch.zeros(shape, dtype=torch.bool)
    positions, segments = torch.zeros((2, *shape), dtype=torch.int64)
    for row, example in enumerate(examples):
        end = len(example.input_ids)
        ids[row, :end] = torch.tensor(example.input_ids)
        supervised[row, :end] = torch.tensor(example.supervised)
        for number, start in enumerate(example.starts, 1):
            positions[row, start:end] = torch.arange(end - start)
            segments[row, start:end] = number
    return Batch(
        input_ids=ids.to(device),
        supervised=supervised.to(device),
        num_tokens=sum(len(example.input_ids) for example in examples),
        # The first token of a row has nothing before it that could predict it.
        num_supervised=int(supervised[:, 1:].sum()),
        position_ids=positions.to(device) if packed else None,
        segments=segments.to(device) if packed else None,
    )
