"""What paged attention means, in plain torch; also how it runs on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def paged_attention_reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    out: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """See ``shoal.kernels.paged_attention.kernel.paged_prefill``; float32 throughout, any device.

    Decode is the case of one query per row. The only loop is over rows, each of its own length.
    """
    starts = query_starts.tolist()
    kv_heads = keys.shape[2]
    for row, context in enumerate(context_lens.tolist()):
        tokens = slice(starts[row], starts[row + 1])
        new = tokens.stop - tokens.start
        if new == 0:
            continue
        if context == 0:  # a padding row
            out[tokens] = 0
            continue
        k = _context(keys, block_tables[row], context - new, context, window)
        v = _context(values, block_tables[row], context - new, context, window)
        # Query heads that share a kv head stand side by side: (kv_heads, group, new, head_dim).
        grouped = (kv_heads, -1, new, q.shape[2])
        heads = q[tokens].float().transpose(0, 1).reshape(grouped)
        scores = torch.matmul(heads, k.transpose(-1, -2)[:, None]) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        at = torch.arange(context - new, context, device=q.device)[:, None]
        key = torch.arange(context - k.shape[1], context, device=q.device)
        seen = key <= at
        if window is not None:
            seen &= key > at - window
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        attended = torch.matmul(weights, v[:, None])  # (kv_heads, group, new, head_dim)
        out[tokens] = attended.flatten(0, 1).transpose(0, 1).to(out.dtype)


def _context(
    cache: Tensor, table: Tensor, first_query: int, context: int, window: int | None
) -> Tensor:
    """Float32 ``(kv_heads, positions, head_dim)``, from the first position that is seen on."""
    block_tokens = cache.shape[1]
    first = 0 if window is None else max(0, first_query - window + 1)
    blocks = table[first // block_tokens : -(-context // block_tokens)].long()
    gathered = cache.index_select(0, blocks).flatten(0, 1)
    skipped = first // block_tokens * block_tokens
    return gathered[first - skipped : context - skipped].float().transpose(0, 1)
