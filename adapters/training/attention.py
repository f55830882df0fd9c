"""Causal attention for training: PyTorch's fused kernel, and no mask where none is needed.

Transformers decides by looking at the batch whether it needs a mask. That look waits for the
device, and while a CUDA graph is recorded it always answers yes, which costs the fast kernel. A
batch of ours says itself what it needs: rows padded on the right need no mask, packed rows bring
theirs.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "shoal_causal"


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: ``(rows, heads, length, d)`` -> ``(rows, length, heads, d)``.

    Args:
        module: the attention layer.
        query, key, value: of one length.
        attention_mask: None, or one of ``packed_mask``.
        sliding_window: how many tokens back a token sees; None: all.
        options: scaling and others, for transformers' function.
    """
    length = query.shape[2]
    if sliding_window is not None and length > sliding_window:
        causal = _causal(length, query.device)
        band = (causal & ~causal.tril(-sliding_window))[None, None]
        attention_mask = band if attention_mask is None else attention_mask & band
    attended: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **options
    )
    return attended


def use_causal_attention(model: PreTrainedModel) -> None:
    """Make a decoder attend with ``causal_attention``, if it lets its attention be chosen."""
    AttentionInterface.register(NAME, causal_attention)
    model.set_attn_implementation(NAME)


def _causal(length: int, device: torch.device) -> Tensor:
    return torch.ones((length, length), dtype=torch.bool, device=device).tril()
