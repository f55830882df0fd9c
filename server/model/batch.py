"""``Batch``: the tensors of one forward pass, made from planned rows.

It knows nothing of requests or sampling: only which tokens go in, where their keys and values are
written, and which blocks each row may look at.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shoal.adapters.spec import Group
from shoal.server.engine.plan import Row


class AppliesAdapters(Protocol):
    """What the decoder asks of ``shoal.adapters.bank.StepAdapters``."""

    def apply(self, layer: int, group: Group, x: Tensor, y: Tensor) -> None:
        """Add each row's delta to ``y (tokens, n_group)``, the bias-free ``x Wᵀ``, in place."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of one step: one-token (decode) rows first, then prompt chunks.

    Tokens are concatenated in row order. All tensors are int64 on the model's device.

    Attributes:
        input_ids: ``(tokens,)``.
        positions: ``(tokens,)`` position of each token in its own sequence.
        slot_mapping: ``(tokens,)`` where the token's key and value go:
            ``block_id * block_tokens + offset in the block``.
        block_tables: ``(rows, widest)`` block ids of each row, padded with 0.
        context_lens: per row, positions it attends over *including this step's own tokens*. Host
            integers: a backend that needs them on the device copies them once per step.
        query_lens: per row, tokens in this step.
        num_decode_rows: how many leading rows are one-token rows.
        adapters: applies each row's adapter, or None when no row has one.
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    context_lens: tuple[int, ...]
    query_lens: tuple[int, ...]
    num_decode_rows: int
    adapters: AppliesAdapters | None = None

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Row],
        *,
        block_tokens: int,
        device: torch.device | str = "cpu",
        adapters: AppliesAdapters | None = None,
    ) -> "Batch":
        """Build the tensors of planned rows.

        A one-token row after the first longer one counts as a (short) prompt chunk, so a prompt
        whose last chunk is a single token may stand on either side.
        """
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        widest = max((len(row.block_ids) for row in rows), default=0)
        decode = next((i for i, row in enumerate(rows) if len(row.token_ids) != 1), len(rows))
        for row in rows:
            end = row.start + len(row.token_ids)
            assert end <= len(row.block_ids) * block_tokens, f"{row.request_id}: too few blocks"
            ids.extend(row.token_ids)
            for position in range(row.start, end):
                block, offset = divmod(position, block_tokens)
                positions.append(position)
                slots.append(row.block_ids[block] * block_tokens + offset)
        tables = [[*row.block_ids, *(0,) * (widest - len(row.block_ids))] for row in rows]
        return cls(
            input_ids=torch.tensor(ids, dtype=torch.int64, device=device),
            positions=torch.tensor(positions, dtype=torch.int64, device=device),
            slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
            block_tables=torch.tensor(tables, dtype=torch.int64, device=device).view(-1, widest),
            context_lens=tuple(row.start + len(row.token_ids) for row in rows),
            query_lens=tuple(len(row.token_ids) for row in rows),
            num_decode_rows=decode,
            adapters=adapters,
        )
