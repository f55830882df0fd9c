"""What ``rope_kv`` means, in plain torch; also how it runs on a CPU. Owns no launch logic."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.kernels.core_apply.epilogue import (
    Epilogue,
    RowScale,
    epilogue_reference,
    scale_reference,
)

# Beyond what any working model comes near; see ``rope_kv``.
KV_LIMIT = 1e15


def cache_limit(dtype: torch.dtype, limit: float) -> float:
    """``limit``, or the largest number of ``dtype`` where that is smaller."""
    return min(limit, torch.finfo(dtype).max)


def rotation_table(frequencies: Tensor, positions: Tensor, factor: float = 1.0) -> Tensor:
    """cos beside sin of every angle, times ``factor``.

    Args:
        frequencies: ``(head_dim / 2,)`` float32, the angle per position of each pair.
        positions: ``(n,)`` integers: those of a step, or ``0 … max_model_len - 1``.
        factor: multiplies cos and sin (YaRN).

    Returns:
        ``(n, head_dim)`` float32.
    """
    angles = positions.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1) * factor


def rope_kv_reference(
    qkv: Tensor,
    heads: int,
    positions: Tensor,
    rotations: Tensor,
    slot_mapping: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    kv_limit: float = KV_LIMIT,
    core: Epilogue | None = None,
    scale: RowScale | None = None,
) -> Tensor:
    """See ``shoal.kernels.rope_kv.kernel.rope_kv``; float32 inside, any device."""
    block_tokens, kv_heads, head_dim = key_cache.shape[1:]
    widths = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    y = qkv[:, : sum(widths)].float()
    if core is not None:
        y = y.clone() if y.dtype == qkv.dtype else y
        epilogue_reference(y, qkv, core, widths)
    if scale is not None:
        y = scale_reference(y, scale)
    if bias is not None:
        y = y + bias.float()
    heads_each = [heads, kv_heads, kv_heads]
    q, k, v = torch.split(y.view(-1, sum(heads_each), head_dim), heads_each, dim=1)
    limit = cache_limit(key_cache.dtype, kv_limit)

    def finite(x: Tensor) -> Tensor:
        return x.nan_to_num(0.0).clamp(-limit, limit)

    k, v = finite(k), finite(v)
    if q_norm is not None and k_norm is not None:
        q = F.rms_norm(q, (head_dim,), q_norm.float(), eps)
        k = F.rms_norm(k, (head_dim,), k_norm.float(), eps)
    cos, sin = rotations[positions].float()[:, None, :].chunk(2, dim=2)
    q, k = _rotate(q, cos, sin), finite(_rotate(k, cos, sin))
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    where = (slots // block_tokens, slots % block_tokens)
    key_cache.index_put_(where, k[kept].to(key_cache.dtype))
    value_cache.index_put_(where, v[kept].to(value_cache.dtype))
    return q.to(qkv.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=2)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=2)
