"""Attention over the paged cache: what ``--attention`` names, and attention in torch.

The torch backend is told about a step once, where it prepares indices and masks, and is then called
once per layer. It is the plain runner's and the reference for every other. On a GPU the fused step
(``fused.py``) launches the kernels of ``shoal.kernels.paged_attention``, or xformers', itself.
"""

from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.kernels.errors import TritonMissing
from shoal.kernels.launching import require_triton
from shoal.server.model.attention_xformers import XformersUnusable, load_xformers
from shoal.server.model.batch import Batch
from shoal.server.model.kv_cache import KVCache

# Gathered keys of one group of decode rows stay under this many elements: small enough for the
# allocator to reuse the memory (above 32 MiB glibc maps fresh pages on each call, measured 5x
# slower) and large enough that there are few groups.
GATHER_ELEMENTS = 1 << 20
# A GPU's caching allocator has no such cliff, and each group costs launches: 256 rows of an
# 8B-shaped decode step took 310 ms in groups of the size above and 38 ms in groups of this one
# (H100, 2026-11).
GATHER_ELEMENTS_GPU = 1 << 28


class StepAttention(Protocol):
    """Attention of one step, all indices prepared."""

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Write the step's keys and values to the cache, then attend.

        Args:
            layer: decoder layer.
            q: ``(tokens, heads, head_dim)``, rotated.
            k, v: ``(tokens, kv_heads, head_dim)``, ``k`` rotated; finite (the decoder sees to it).
            scale: multiplies ``q·k``.
            window: how many positions a token sees, itself included; None for all.
            softcap: ``c·tanh(score/c)`` before the mask, or None.

        Returns:
            ``(tokens, heads * head_dim)`` in ``q``'s dtype.
        """
        ...


AttentionName = Literal["triton", "xformers", "torch"]


def resolve_attention(name: str, device: torch.device) -> AttentionName:
    """The backend that a name means on a device: ``auto`` is torch on a CPU, else triton.

    Raises:
        ValueError: the backend is not installed, or does not run on the device.
    """
    if name == "torch" or (name == "auto" and device.type == "cpu"):
        return "torch"
    if device.type == "cpu":
        raise ValueError(f"--attention is {name!r}: must be torch or auto on a CPU")
    if name == "xformers":
        try:
            load_xformers()
        except XformersUnusable as problem:
            raise ValueError(f"--attention is 'xformers': {problem}") from problem
        return "xformers"
    try:
        require_triton()
    except TritonMissing as problem:
        raise ValueError(
            f"--attention is {name!r}: {problem}; --attention torch does without, slowly"
        ) from problem
    return "triton"


def torch_attention(batch: Batch, kv: KVCache) -> StepAttention:
    """Prepare a step, on any device. The cache is written by the calls that follow, not here.

    Decode rows are sorted by context, cut into groups of similar length and computed a group at a
    time; prompt chunks one row at a time, with causal SDPA where nothing precedes the chunk.
    """
    return _TorchAttention(batch, kv)


class _Group:
    """Some decode rows, and the cache positions that one window lets them see."""

    def __init__(self, batch: Batch, rows: list[int], window: int | None, kv: KVCache):
        device, block_tokens = batch.input_ids.device, kv.block_tokens
        lens = torch.tensor([batch.context_lens[i] for i in rows], device=device)
        begin = (lens - window).clamp_min(0) if window else torch.zeros_like(lens)
        first = begin // block_tokens  # blocks wholly before the window are not read
        width = int(((lens - 1) // block_tokens - first).max()) + 1
        columns = first[:, None] + torch.arange(width, device=device)  # (rows, width)
        self.rows = torch.tensor(rows, device=device)
        tables = batch.block_tables.index_select(0, self.rows)
        self.blocks = tables.gather(1, columns.clamp_max(tables.shape[1] - 1)).flatten()
        positions = (first * block_tokens)[:, None] + torch.arange(
            width * block_tokens, device=device
        )
        seen = (positions < lens[:, None]) & (positions >= begin[:, None])
        self.mask = _additive(seen, kv)[:, None, None, :]  # (rows, 1, 1, positions)
        self.count = len(rows)


class _Chunk:
    """One prompt chunk: its tokens, and the blocks that hold its context."""

    def __init__(self, batch: Batch, row: int, first_token: int, block_tokens: int):
        self.tokens = slice(first_token, first_token + batch.query_lens[row])
        self.context = batch.context_lens[row]
        self.start = self.context - batch.query_lens[row]
        self.blocks = batch.block_tables[row, : -(-self.context // block_tokens)]

    def mask(self, window: int | None, device: torch.device) -> Tensor:
        """``(chunk, context)``, true where a token may look."""
        at = torch.arange(self.start, self.context, device=device)[:, None]
        key = torch.arange(self.context, device=device)
        seen = key <= at
        return seen & (key > at - window) if window else seen


class _TorchAttention:
    def __init__(self, batch: Batch, kv: KVCache):
        self._batch = batch
        self._kv = kv
        self._groups: dict[int | None, list[_Group]] = {}
        self._masks: dict[tuple[int, int | None], Tensor] = {}
        self._chunks: list[_Chunk] = []
        token = batch.num_decode_rows
        for row in range(batch.num_decode_rows, len(batch.query_lens)):
            self._chunks.append(_Chunk(batch, row, token, kv.block_tokens))
            token += batch.query_lens[row]

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        self._kv.write(layer, self._batch.slot_mapping, k, v)
        keys, values = self._kv.keys[layer], self._kv.values[layer]
        out = torch.empty_like(q)  # (tokens, heads, head_dim)
        for group in self._decode_groups(window):
            out.index_copy_(0, group.rows, _decode(q, keys, values, group, scale, softcap))
        for index, chunk in enumerate(self._chunks):
            chunk_q = q[chunk.tokens].transpose(0, 1)[None]  # (1, heads, chunk, head_dim)
            mask: Tensor | None = None
            if chunk.start == 0 and softcap is None and (not window or window >= chunk.context):
                chunk_k, chunk_v = k[chunk.tokens], v[chunk.tokens]
            else:
                mask = self._chunk_mask(index, window)
                chunk_k = keys.index_select(0, chunk.blocks).flatten(0, 1)[: chunk.context]
                chunk_v = values.index_select(0, chunk.blocks).flatten(0, 1)[: chunk.context]
            heads = q.shape[1] // k.shape[1]
            chunk_k = _repeat(chunk_k.transpose(0, 1)[None], heads)  # (1, heads, context, head_dim)
            chunk_v = _repeat(chunk_v.transpose(0, 1)[None], heads)
            got = _attend(chunk_q, chunk_k, chunk_v, mask, scale, softcap)
            out[chunk.tokens] = got[0].transpose(0, 1)
        return out.flatten(1)

    def _decode_groups(self, window: int | None) -> list[_Group]:
        """Decode rows in groups of similar context, prepared once per step and window."""
        if window not in self._groups:
            batch, kv = self._batch, self._kv
            shape = kv.keys[0].shape
            position_elements = shape[2] * shape[3]
            seen = [min(n, window or n) for n in batch.context_lens[: batch.num_decode_rows]]
            on_cpu = batch.positions.device.type == "cpu"
            limit = GATHER_ELEMENTS if on_cpu else GATHER_ELEMENTS_GPU
            groups: list[list[int]] = []
            room = 0
            for row in sorted(range(len(seen)), key=seen.__getitem__, reverse=True):
                if not room:  # the first row of a group is its longest
                    room = max(1, limit // (seen[row] * position_elements))
                    groups.append([])
                groups[-1].append(row)
                room -= 1
            self._groups[window] = [_Group(batch, g, window, kv) for g in groups]
        return self._groups[window]

    def _chunk_mask(self, index: int, window: int | None) -> Tensor:
        key = (index, window)
        if key not in self._masks:
            seen = self._chunks[index].mask(window, self._batch.input_ids.device)
            self._masks[key] = _additive(seen, self._kv)
        return self._masks[key]


def _decode(
    q: Tensor, keys: Tensor, values: Tensor, group: _Group, scale: float, softcap: float | None
) -> Tensor:
    """Decode rows of one group; ``(rows, heads, head_dim)``.

    The query heads that share a kv head stand where SDPA expects query positions, so that each key
    is read once.
    """
    kv_heads, head_dim = keys.shape[2:]
    shape = (group.count, -1, kv_heads, head_dim)
    k = keys.index_select(0, group.blocks).view(shape).transpose(1, 2)  # (rows, kv, positions, dim)
    v = values.index_select(0, group.blocks).view(shape).transpose(1, 2)
    grouped = q.index_select(0, group.rows).view(group.count, kv_heads, -1, head_dim)
    return _attend(grouped, k, v, group.mask, scale, softcap).reshape(group.count, -1, head_dim)


def _additive(seen: Tensor, kv: KVCache) -> Tensor:
    """0 where ``seen``, else -inf: SDPA converts a bool mask on every call, once per layer."""
    mask = torch.zeros(seen.shape, dtype=kv.keys[0].dtype, device=seen.device)
    return mask.masked_fill_(~seen, float("-inf"))


def _repeat(x: Tensor, times: int) -> Tensor:
    """``(1, kv_heads, n, d)`` -> ``(1, kv_heads * times, n, d)``, each head ``times`` in a row."""
    return x if times == 1 else x.repeat_interleave(times, dim=1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """Attention of ``(n, h, q, d)`` over ``(n, h, k, d)``; without a mask it is causal."""
    if softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
        )
    assert mask is not None
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * scale
    weights = (torch.tanh(scores / softcap) * softcap + mask).softmax(-1)
    return torch.matmul(weights.to(v.dtype), v)
