"""The arrays of one step, from planned rows to static device tensors.

``StepTensors`` owns one set of them: how rows become entries, and the copy to the device. A step of
decode rows alone and a step with prompts have a set each. It runs nothing.
"""

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shoal.server.engine.plan import Row
from shoal.server.model.sampler import TEMPERATURE_MIN, uniform_of
from shoal.server.model.staging import Staging


class Layout(NamedTuple):
    """How a step's rows are laid out, unused places included.

    Attributes:
        decode_rows: places for rows of one token, which come first.
        chunks: places for prompt chunks, behind them.
        chunk_tokens: places for the chunks' tokens, behind the decode rows' tokens.
    """

    decode_rows: int
    chunks: int = 0
    chunk_tokens: int = 0

    @property
    def rows(self) -> int:
        return self.decode_rows + self.chunks

    @property
    def tokens(self) -> int:
        return self.decode_rows + self.chunk_tokens


class Loaded(NamedTuple):
    """What a step's arrays hold.

    Attributes:
        sampled: rows that sample, which are the first entries of the sampling arrays.
        longest: positions that the longest row sees.
        greedy: whether every sampling row takes the most probable token.
    """

    sampled: int
    longest: int
    greedy: bool


def layout_of(rows: Sequence[Row]) -> Layout:
    """Room for exactly these rows: one-token rows first, then chunks (as in ``StepPlan``)."""
    decode = next((i for i, row in enumerate(rows) if len(row.token_ids) != 1), len(rows))
    tokens = sum(len(row.token_ids) for row in rows[decode:])
    return Layout(decode, len(rows) - decode, tokens)


class StepTensors:
    """Static tensors for steps of at most ``max_tokens`` tokens in ``max_rows`` rows.

    Lanes are below ``num_lanes``, which is the lane of unused places.

    ``device`` has, by name: per token ``ids`` (-1: the lane's last token), ``token_lanes``,
    ``positions``, ``slots`` (int64); per row ``contexts`` (int32); per chunk ``starts`` (int32);
    per sampling row ``sampled_at``, ``lanes`` (int64), ``temperature``, ``top_p``, ``min_p``
    (float32), ``top_k`` (int32), ``uniform`` (float64); and ``tables`` (int32).
    """

    def __init__(
        self,
        *,
        max_tokens: int,
        max_rows: int,
        num_lanes: int,
        max_blocks: int,
        block_tokens: int,
        device: torch.device,
    ) -> None:
        self.block_tokens = block_tokens
        self.spare_lane = num_lanes
        self._staging = Staging(
            {
                "ids": (torch.int64, max_tokens),
                "token_lanes": (torch.int64, max_tokens),
                "positions": (torch.int64, max_tokens),
                "slots": (torch.int64, max_tokens),
                "contexts": (torch.int32, max_rows),
                "starts": (torch.int32, max_rows + 1),
                "sampled_at": (torch.int64, max_rows),
                "lanes": (torch.int64, max_rows),
                "temperature": (torch.float32, max_rows),
                "top_p": (torch.float32, max_rows),
                "min_p": (torch.float32, max_rows),
                "top_k": (torch.int32, max_rows),
                "uniform": (torch.float64, max_rows),
                "tables": (torch.int32, max_rows * max_blocks),
            },
            device,
        )
        self.device = self._staging.device
        # Block tables by lane: most rows have the blocks that they had in the step before.
        self._blocks = np.zeros((num_lanes, max_blocks), np.int32)
        self._known: list[tuple[int, ...] | None] = [None] * num_lanes

    def load(
        self,
        rows: Sequence[Row],
        layout: Layout,
        *,
        entropy: random.Random,
        table_blocks: int,
    ) -> Loaded:
        """Write ``rows`` to the device, on the current stream.

        Args:
            rows: one-token rows first, then chunks (as in ``StepPlan``).
            layout: at least ``layout_of(rows)``. Unused places read and write nothing: their
                tokens have slot -1, their rows context 0 and a lane that nobody has.
            entropy: of unseeded draws.
            table_blocks: width of the block tables; no row has more blocks.
        """
        used = layout_of(rows)
        n = used.decode_rows
        host = self._staging.begin()
        self._remember(rows)
        lanes = np.fromiter((row.lane for row in rows), np.int64, len(rows))
        starts = np.fromiter((row.start for row in rows[:n]), np.int64, n)
        # Where each row's entries are: chunks come behind the unused decode rows.
        places = np.arange(len(rows)) + (np.arange(len(rows)) >= n) * (layout.decode_rows - n)
        shown = host.tables[: layout.rows * table_blocks].reshape(layout.rows, table_blocks)
        shown[places] = self._blocks[lanes, :table_blocks]
        host.ids[:n] = [row.token_ids[0] for row in rows[:n]]
        host.token_lanes[:n] = lanes[:n]
        host.positions[:n] = starts
        block, offset = np.divmod(starts, self.block_tokens)
        found = self._blocks[lanes[:n], block].astype(np.int64)
        host.slots[:n] = found * self.block_tokens + offset
        host.contexts[:n] = starts + 1
        self._pad_rows(host, slice(n, layout.decode_rows), shown)
        self._pad_tokens(host, slice(n, layout.decode_rows))
        token = layout.decode_rows
        host.starts[0] = 0
        for i, row in enumerate(rows[n:]):
            token = self._chunk(host, row, layout.decode_rows + i, token)
            host.starts[i + 1] = token - layout.decode_rows
        self._pad_rows(host, slice(layout.decode_rows + used.chunks, layout.rows), shown)
        self._pad_tokens(host, slice(token, layout.tokens))
        host.starts[used.chunks + 1 : layout.chunks + 1] = used.chunk_tokens
        sampled, greedy = self._sampling(host, rows, layout, entropy)
        self._staging.upload("tables", layout.rows * table_blocks)
        longest = max((row.start + len(row.token_ids) for row in rows), default=0)
        return Loaded(sampled, longest, greedy)

    def tables(self, rows: int, table_blocks: int) -> Tensor:
        """The block tables of ``rows`` rows: ``(rows, table_blocks)`` int32."""
        return self.device["tables"][: rows * table_blocks].view(rows, table_blocks)

    def _remember(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if self._known[row.lane] is not row.block_ids:
                self._blocks[row.lane, : len(row.block_ids)] = row.block_ids
                self._known[row.lane] = row.block_ids

    def _pad_tokens(self, host: SimpleNamespace, tokens: slice) -> None:
        host.ids[tokens] = 0
        host.token_lanes[tokens] = self.spare_lane
        host.positions[tokens] = 0
        host.slots[tokens] = -1

    def _pad_rows(self, host: SimpleNamespace, rows: slice, tables: Any) -> None:
        host.contexts[rows] = 0
        tables[rows] = 0

    def _chunk(self, host: SimpleNamespace, row: Row, index: int, token: int) -> int:
        """Write one chunk's tokens; returns where the next one's begin."""
        end = token + len(row.token_ids)
        positions = np.arange(row.start, row.start + len(row.token_ids))
        block, offset = np.divmod(positions, self.block_tokens)
        host.ids[token:end] = row.token_ids
        host.token_lanes[token:end] = row.lane
        host.positions[token:end] = positions
        host.slots[token:end] = (
            self._blocks[row.lane, block].astype(np.int64) * (self.block_tokens) + offset
        )
        host.contexts[index] = row.start + len(row.token_ids)
        return end

    def _sampling(
        self,
        host: SimpleNamespace,
        rows: Sequence[Row],
        layout: Layout,
        entropy: random.Random,
    ) -> tuple[int, bool]:
        """Where each sampling row's logits come from, and how its token is chosen.

        Returns:
            How many rows sample, and whether all of them are greedy.
        """
        sampling, ends = [], []
        at = -1
        used = layout_of(rows)
        for i, row in enumerate(rows):
            at += len(row.token_ids)
            if i == used.decode_rows:  # the first chunk: behind the unused decode rows
                at += layout.decode_rows - used.decode_rows
            if row.sample:
                sampling.append(row)
                ends.append(at)
        count = len(sampling)
        host.sampled_at[:count] = ends
        host.lanes[:count] = [row.lane for row in sampling]
        wanted = [row.sampling for row in sampling]
        temperatures = [params.temperature for params in wanted]
        host.temperature[:count] = temperatures
        unused = slice(count, layout.rows)
        host.sampled_at[unused] = 0
        host.lanes[unused] = self.spare_lane
        host.temperature[unused] = 0.0
        greedy = all(t <= TEMPERATURE_MIN for t in temperatures)
        if not greedy:
            host.top_p[:count] = [params.top_p for params in wanted]
            host.min_p[:count] = [params.min_p for params in wanted]
            host.top_k[:count] = [params.top_k for params in wanted]
            host.uniform[:count] = [uniform_of(row, entropy) for row in sampling]
        return count, greedy
