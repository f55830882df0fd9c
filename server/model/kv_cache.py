"""``KVCache``: the paged keys and values of every layer; block ownership is decided elsewhere."""

import torch
from torch import Tensor

from shoal.server.model.config import ModelConfig


class KVCache:
    """Keys and values in fixed blocks of positions.

    Layout of ``keys[layer]`` and ``values[layer]``: ``(num_blocks, block_tokens, kv_heads,
    head_dim)``. Gathered blocks of a row are then one strided ``(kv_heads, positions, head_dim)``
    view without a copy, and one block is one contiguous run of memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_blocks: int,
        block_tokens: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        shape = (2, config.num_layers, num_blocks, block_tokens, config.num_kv_heads)
        # Zeros, not empty: a masked position contributes 0 * value, which must not be NaN. (On a
        # CPU the pages are only taken from the system when a block is first written.)
        self._data = torch.zeros((*shape, config.head_dim), device=device, dtype=dtype)
        self.keys: tuple[Tensor, ...] = self._data[0].unbind(0)
        self.values: tuple[Tensor, ...] = self._data[1].unbind(0)

    @staticmethod
    def block_bytes(config: ModelConfig, *, block_tokens: int, dtype: torch.dtype) -> int:
        """Bytes one block takes over all layers, keys and values."""
        return 2 * config.num_layers * block_tokens * config.kv_size * dtype.itemsize

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store new positions.

        Args:
            layer: decoder layer.
            slots: ``(tokens,)`` int64, ``block * block_tokens + offset``, all different.
            keys, values: ``(tokens, kv_heads, head_dim)``.
        """
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, keys)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, values)
