"""The arrays of one step, from planned rows to static device tensors.

``StepTensors`` owns one set of them: how rows become entries, and the copy to the device. A step of
decode rows alone and a step with prompts have a set each. It runs nothing.
"""

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shoal.server.engine.plan import Row
from shoal.server.model.sampler import TEMPERATURE_MIN, uniform_of
from shoal.server.model.staging import Staging


class Loaded(NamedTuple):
    """What a step's arrays hold.

    Attributes:
        tokens: of all rows.
        decode_rows: leading rows of one token each; the others are prompt chunks.
        sampled: rows that sample, which are the first entries of the sampling arrays.
        longest: positions that the longest row sees.
        greedy: whether every sampling row takes the most probable token.
    """

    tokens: int
    decode_rows: int
    sampled: int
    longest: int
    greedy: bool


class StepTensors:
    """Static tensors for steps of at most ``max_tokens`` tokens in ``max_rows`` rows.

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
        max_blocks: int,
        block_tokens: int,
        device: torch.device,
    ) -> None:
        self.block_tokens = block_tokens
        self.spare_lane = max_rows
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
        self._blocks = np.zeros((max_rows + 1, max_blocks), np.int32)
        self._known: list[tuple[int, ...] | None] = [None] * (max_rows + 1)
        self._greedy = True

    def load(
        self,
        rows: Sequence[Row],
        *,
        entropy: random.Random,
        table_blocks: int,
        padded_rows: int = 0,
    ) -> Loaded:
        """Write ``rows`` to the device, on the current stream.

        Args:
            rows: one-token rows first, then chunks (as in ``StepPlan``).
            entropy: of unseeded draws.
            table_blocks: width of the block tables; no row has more blocks.
            padded_rows: with decode rows alone, entries up to this one are made padding: slot -1,
                context 0, and a lane that nobody has.
        """
        host = self._staging.begin()
        lanes = np.fromiter((row.lane for row in rows), np.int64, len(rows))
        starts = np.fromiter((row.start for row in rows), np.int64, len(rows))
        decode = next((i for i, row in enumerate(rows) if len(row.token_ids) != 1), len(rows))
        self._remember(rows)
        count = max(len(rows), padded_rows)
        shown = host.tables[: count * table_blocks].reshape(count, table_blocks)
        shown[: len(rows)] = self._blocks[lanes, :table_blocks]
        host.ids[:decode] = [row.token_ids[0] for row in rows[:decode]]
        host.token_lanes[:decode] = lanes[:decode]
        host.positions[:decode] = starts[:decode]
        block, offset = np.divmod(starts[:decode], self.block_tokens)
        found = self._blocks[lanes[:decode], block].astype(np.int64)
        host.slots[:decode] = found * self.block_tokens + offset
        host.contexts[:decode] = starts[:decode] + 1
        host.starts[0] = 0
        token = decode
        for i in range(decode, len(rows)):
            token = self._chunk(host, rows[i], i, token)
            host.starts[i - decode + 1] = token - decode
        sampled = self._sampling(host, rows, entropy)
        if padded_rows > len(rows):
            self._pad(host, slice(len(rows), padded_rows), slice(len(rows), padded_rows))
            shown[len(rows) :] = 0
        self._staging.upload("tables", count * table_blocks)
        longest = int(host.contexts[: len(rows)].max(initial=0))
        return Loaded(token, decode, sampled, longest, self._greedy)

    def load_padding(self, tokens: int, rows: int, table_blocks: int) -> None:
        """Write tokens and rows that read nothing and write nothing; every chunk is empty."""
        host = self._staging.begin()
        self._pad(host, slice(0, tokens), slice(0, rows))
        host.starts[: rows + 1] = 0
        host.sampled_at[:rows] = 0
        host.tables[: rows * table_blocks] = 0
        self._staging.upload("tables", rows * table_blocks)

    def tables(self, rows: int, table_blocks: int) -> Tensor:
        """The block tables of ``rows`` rows: ``(rows, table_blocks)`` int32."""
        return self.device["tables"][: rows * table_blocks].view(rows, table_blocks)

    def _remember(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if self._known[row.lane] is not row.block_ids:
                self._blocks[row.lane, : len(row.block_ids)] = row.block_ids
                self._known[row.lane] = row.block_ids

    def _pad(self, host: SimpleNamespace, tokens: slice, rows: slice) -> None:
        host.ids[tokens] = 0
        host.token_lanes[tokens] = self.spare_lane
        host.positions[tokens] = 0
        host.slots[tokens] = -1
        host.contexts[rows] = 0
        host.lanes[rows] = self.spare_lane
        host.temperature[rows] = 0.0

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

    def _sampling(self, host: SimpleNamespace, rows: Sequence[Row], entropy: random.Random) -> int:
        """Where each sampling row's logits come from, and how its token is chosen."""
        at, sampling = -1, []
        ends = []
        for row in rows:
            at += len(row.token_ids)
            if row.sample:
                sampling.append(row)
                ends.append(at)
        count = len(sampling)
        host.sampled_at[:count] = ends
        host.lanes[:count] = [row.lane for row in sampling]
        wanted = [row.sampling for row in sampling]
        temperatures = [params.temperature for params in wanted]
        host.temperature[:count] = temperatures
        self._greedy = all(t <= TEMPERATURE_MIN for t in temperatures)
        if not self._greedy:
            host.top_p[:count] = [params.top_p for params in wanted]
            host.min_p[:count] = [params.min_p for params in wanted]
            host.top_k[:count] = [params.top_k for params in wanted]
            host.uniform[:count] = [uniform_of(row, entropy) for row in sampling]
        return count
