"""Attention by xformers, an optional package: ``pip install 'shoal[xformers]'``.

Decode rows attend over the paged cache; prompt chunks over a copy of the keys they see, because
xformers has no paged kernel for more than 16 queries that runs on torch's own FlashAttention. Its
masks are made of lengths on the host, so a step cannot be captured in a graph. The package is
imported only when it is chosen.
"""

import ctypes
import functools
import importlib.util
import logging
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from shoal.server.model.config import ModelConfig
from shoal.server.model.kv_cache import KVCache

log = logging.getLogger(__name__)

HEAD_DIMS = (16, 32, 64, 128, 256, 512)
CUDART = "libcudart.so.12"
TRITON_WITHOUT_BLOCK_POINTERS = (3, 9)


class XformersUnusable(RuntimeError):
    """xformers was asked for, and is not there or does not go with what is."""


@functools.cache
def load_xformers() -> ModuleType:
    """``xformers.ops.fmha``, with the CUDA library that its wheel was linked against.

    Raises:
        XformersUnusable: it is not installed, or does not go with this torch or Triton.
    """
    _check_triton()
    _load_cudart()
    try:
        from xformers.ops import fmha
    except ImportError as problem:
        raise XformersUnusable(
            f"xformers cannot be imported ({problem}): pip install 'shoal[xformers]'"
        ) from problem
    module: ModuleType = fmha
    return module


def _check_triton() -> None:
    found = version("triton") if importlib.util.find_spec("triton") else "none"
    number = re.match(r"(\d+)\.(\d+)", found)
    if number is None or (int(number[1]), int(number[2])) >= TRITON_WITHOUT_BLOCK_POINTERS:
        raise XformersUnusable(
            f"xformers' paged kernel needs Triton's block pointers, which went with 3.9, and the"
            f" version here is {found}; --attention triton has kernels of its own"
        )


def _load_cudart() -> None:
    """Make CUDA 12's runtime known to the process: beside a CUDA-13 torch nobody else loads it."""
    found = importlib.util.find_spec("nvidia")
    for folder in () if found is None else found.submodule_search_locations or ():
        library = Path(folder) / "cuda_runtime" / "lib" / CUDART
        if library.is_file():
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            return
    log.debug("no %s in a wheel: xformers must find one itself", CUDART)


def check_model(config: ModelConfig, dtype: torch.dtype) -> None:
    """Refuse what xformers' kernels cannot do.

    Raises:
        ValueError: the message names the flag.
    """
    refused = None
    if dtype == torch.float32:
        refused = "float32: only float16 and bfloat16 run there"
    elif config.head_dim not in HEAD_DIMS:
        refused = f"heads of {config.head_dim} elements: they must be one of {HEAD_DIMS}"
    elif config.attention_softcap is not None:
        refused = "a model with capped attention scores"
    if refused is not None:
        raise ValueError(f"--attention is 'xformers', which cannot serve {refused}")


class XformersAttention:
    """A step's attention over a cache that already holds its keys and values.

    Called as ``attend(layer, q, scale, window, softcap)`` with ``q (tokens, heads, head_dim)``;
    returns ``(tokens, heads * head_dim)``. ``softcap`` must be None (see ``check_model``).

    Args:
        kv: the cache; its blocks are a multiple of 64 tokens.
        block_tables: ``(rows, widest)`` integers, decode rows first; unused entries are valid
            block ids.
        query_lens, context_lens: per row, on the host, as in ``Batch``.
        num_decode_rows: how many leading rows have one token each.
    """

    def __init__(
        self,
        kv: KVCache,
        *,
        block_tables: Tensor,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        num_decode_rows: int,
    ) -> None:
        self._fmha = load_xformers()
        self._kv = kv
        self._tables = block_tables
        self._queries = tuple(query_lens)
        self._contexts = tuple(context_lens)
        self._decode = num_decode_rows
        self._paged: Any = None
        self._masks: dict[tuple[int, int | None], Any] = {}
        self._slots: dict[int, Tensor] = {}

    def __call__(
        self, layer: int, q: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """See the class."""
        assert softcap is None, "check_model refuses such models"
        out = torch.empty_like(q)
        # A window is not in the paged kernel: where there is one, every row attends over a copy.
        n = self._decode if window is None else 0
        if n:
            out[:n] = self._attend_paged(layer, q[:n], scale)
        if n < len(self._queries):
            out[n:] = self._attend_copied(layer, q[n:], n, scale, window)
        return out.flatten(1)

    def _attend_paged(self, layer: int, q: Tensor, scale: float) -> Tensor:
        n = len(q)
        if self._paged is None:
            self._paged = self._fmha.attn_bias.PagedBlockDiagonalPaddedKeysMask.from_seqlens(
                q_seqlen=[1] * n,
                kv_seqlen=list(self._contexts[:n]),
                block_tables=self._tables[:n].to(torch.int32),
                page_size=self._kv.block_tokens,
                device=q.device,
            )
        return self._run(
            q,
            self._kv.keys[layer].flatten(0, 1),
            self._kv.values[layer].flatten(0, 1),
            self._paged,
            scale,
            op=self._fmha.triton_splitk.FwOp,
        )

    def _attend_copied(
        self, layer: int, q: Tensor, first: int, scale: float, window: int | None
    ) -> Tensor:
        key = (first, window)
        if key not in self._masks:
            queries, contexts = list(self._queries[first:]), list(self._contexts[first:])
            mask = self._fmha.attn_bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens(
                queries, contexts, device=q.device
            )
            if window is not None:
                mask = mask.make_local_attention_from_bottomright(window)
            self._masks[key] = mask
        if first not in self._slots:
            self._slots[first] = self._slots_seen(first)
        slots = self._slots[first]
        keys = self._kv.keys[layer].flatten(0, 1).index_select(0, slots)
        values = self._kv.values[layer].flatten(0, 1).index_select(0, slots)
        return self._run(q, keys, values, self._masks[key], scale, op=None)

    def _slots_seen(self, first: int) -> Tensor:
        """The cache slots of every position that the rows from ``first`` see, row by row."""
        contexts = torch.tensor(self._contexts[first:])
        rows = torch.repeat_interleave(torch.arange(first, len(self._contexts)), contexts)
        starts = contexts.cumsum(0) - contexts
        positions = torch.arange(len(rows)) - torch.repeat_interleave(starts, contexts)
        at = torch.stack((rows, positions)).to(self._tables.device)
        block, offset = at[1] // self._kv.block_tokens, at[1] % self._kv.block_tokens
        return self._tables[at[0], block].long() * self._kv.block_tokens + offset

    def _run(
        self, q: Tensor, keys: Tensor, values: Tensor, bias: Any, scale: float, op: Any
    ) -> Tensor:
        """Attend with the heads as xformers wants them: ``(1, n, kv_heads, heads of each, d)``."""
        kv_heads = keys.shape[1]
        grouped = q.view(1, len(q), kv_heads, -1, q.shape[-1])
        shape = (1, len(keys), *grouped.shape[2:])
        out: Tensor = self._fmha.memory_efficient_attention_forward(
            grouped,
            keys[None, :, :, None].expand(shape),
            values[None, :, :, None].expand(shape),
            bias,
            scale=scale,
            op=op,
        )
        return out[0].flatten(1, 2)
