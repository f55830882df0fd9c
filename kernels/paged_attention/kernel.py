"""Attention over a paged cache: ``paged_decode`` (one query per row) and ``paged_prefill``.

Owns argument checks and dispatch; launch parameters are in ``launches.py``. Dispatch goes by
device alone: CPU tensors run the reference, GPU tensors the Triton kernels. ``launch_paged_*``
always launch; on CPU tensors that needs Triton's interpreter. No launch depends on the *values* of
lengths, tables or starts, and nothing is copied to the host: it can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.kernels.errors import ShapeError, check_devices, check_matrix, check_vector
from shoal.kernels.launching import FLOATS, dot_in_float32, power_of_two, require_triton
from shoal.kernels.paged_attention.launches import (
    MAX_SPLITS,
    DecodeConfig,
    PrefillConfig,
    default_decode_config,
    default_prefill_config,
    processors,
    row_class,
)
from shoal.kernels.paged_attention.reference import paged_attention_reference


def paged_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    max_context: int | None = None,
    out: Tensor | None = None,
    config: DecodeConfig | None = None,
) -> Tensor:
    """Attention of one new token per row over the row's cached positions, its own included.

    Args:
        q: ``(rows, heads, head_dim)``; the heads of kv head ``j`` are ``j·group …``. The first two
            axes may be strided.
        keys, values: ``(blocks, block_tokens, kv_heads, head_dim)``, with the same strides.
        block_tables: ``(rows, widest)`` int32 or int64: block of each ``block_tokens`` positions.
            Entries beyond a row's context are not read.
        context_lens: ``(rows,)`` int32: positions in the cache, the new one included. 0 marks a
            padding row, whose output is zero.
        scale: multiplies ``q·k``.
        window: how many positions are seen, the token itself included; None for all.
        softcap: ``c·tanh(score/c)`` before the mask, or None.
        max_context: no row is longer; decides how many programs share a row. Default: what
            ``block_tables`` has room for.
        out: ``(rows, heads, head_dim)``, rows may be strided; default: a new tensor.
        config: launch parameters, for measurements.

    All floats are of one dtype: float32, float16 or bfloat16; sums are float32.
    A row that is split is summed in another order: the launch's number of rows (not the other
    rows' content) may change a result by rounding.

    Returns:
        ``out``.

    Raises:
        ShapeError: a shape, dtype, stride or device is wrong (names the argument).
        TritonMissing: the tensors are on a GPU and Triton is not installed.

    Cost: reads each row's keys and values once; memory bound.
    """
    out = _check(q, keys, values, block_tables, context_lens, window, softcap, out)
    _check_decode(q, block_tables, config)
    if q.device.type != "cpu":
        return _launch_decode(
            q, keys, values, block_tables, context_lens, out, scale, window, softcap, max_context,
            config,
        )  # fmt: skip
    starts = torch.arange(q.shape[0] + 1)
    paged_attention_reference(
        q, keys, values, block_tables, context_lens, starts, out,
        scale=scale, window=window, softcap=softcap,
    )  # fmt: skip
    return out


def launch_paged_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    max_context: int | None = None,
    out: Tensor | None = None,
    config: DecodeConfig | None = None,
) -> Tensor:
    """``paged_decode`` through Triton on any device; CPU tensors need ``TRITON_INTERPRET=1``."""
    out = _check(q, keys, values, block_tables, context_lens, window, softcap, out)
    _check_decode(q, block_tables, config)
    return _launch_decode(
        q, keys, values, block_tables, context_lens, out, scale, window, softcap, max_context,
        config,
    )  # fmt: skip


def paged_prefill(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    out: Tensor | None = None,
    config: PrefillConfig | None = None,
) -> Tensor:
    """Causal attention of chunks of new tokens over the cache, which already holds them.

    Args:
        q: ``(tokens, heads, head_dim)``, the rows' new tokens one row after the other.
        query_starts: ``(rows + 1,)`` int32: row ``i`` has the tokens ``starts[i] … starts[i+1]``,
            the last positions of its context. A row may have none. Output of tokens after the last
            start is left as it was.

    The other arguments, dtypes, result and errors are those of ``paged_decode``, with ``tokens``
    for the first axis of q and out. A token's result depends on nothing but its own row.

    Cost: a tile of ``rows_m / group`` tokens reads the keys and values it sees once (mostly from
    the L2 cache); bound by arithmetic. Limit: a chunk's keys are not split over programs, so one
    short chunk behind a very long context leaves most of a GPU idle.
    """
    out = _check(q, keys, values, block_tables, context_lens, window, softcap, out)
    _check_prefill(q, keys, block_tables, query_starts, config)
    if q.device.type != "cpu":
        return _launch_prefill(
            q, keys, values, block_tables, context_lens, query_starts, out, scale, window,
            softcap, config,
        )  # fmt: skip
    paged_attention_reference(
        q, keys, values, block_tables, context_lens, query_starts, out,
        scale=scale, window=window, softcap=softcap,
    )  # fmt: skip
    return out


def launch_paged_prefill(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    out: Tensor | None = None,
    config: PrefillConfig | None = None,
) -> Tensor:
    """``paged_prefill`` through Triton on any device; CPU tensors need ``TRITON_INTERPRET=1``."""
    out = _check(q, keys, values, block_tables, context_lens, window, softcap, out)
    _check_prefill(q, keys, block_tables, query_starts, config)
    return _launch_prefill(
        q, keys, values, block_tables, context_lens, query_starts, out, scale, window, softcap,
        config,
    )  # fmt: skip


def _check(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    window: int | None,
    softcap: float | None,
    out: Tensor | None,
) -> Tensor:
    """Check what both ops share; returns ``out``, made where it is None."""
    if keys.dim() != 4 or 0 in keys.shape[1:]:
        raise ShapeError("keys", "(blocks, block_tokens, kv_heads, head_dim)", tuple(keys.shape))
    _, block_tokens, kv_heads, head_dim = keys.shape
    if keys.dtype not in FLOATS:
        raise ShapeError("keys", f"a dtype of {FLOATS}", keys.dtype)
    if keys.stride(3) != 1 or keys.stride(0) != block_tokens * keys.stride(1):
        raise ShapeError("keys", "blocks one after the other", f"strides {keys.stride()}")
    if values.shape != keys.shape or values.stride() != keys.stride():
        raise ShapeError("values", f"the shape and strides of keys, {tuple(keys.shape)}",
                         f"{tuple(values.shape)}, strides {values.stride()}")  # fmt: skip
    if q.dim() != 3 or q.shape[1] % kv_heads or not q.shape[1] or q.shape[2] != head_dim:
        raise ShapeError("q", f"(tokens, n·{kv_heads} heads, {head_dim})", tuple(q.shape))
    if head_dim > 1 and q.stride(2) != 1:
        raise ShapeError("q", "a contiguous last axis", f"strides {q.stride()}")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if out.shape != q.shape or out[:1].stride()[1:] != (head_dim, 1):
        raise ShapeError("out", f"shape {tuple(q.shape)}, contiguous but for the first axis",
                         f"{tuple(out.shape)}, strides {out.stride()}")  # fmt: skip
    for name, tensor in (("q", q), ("values", values), ("out", out)):
        if tensor.dtype != keys.dtype:
            raise ShapeError(name, f"the dtype of keys, {keys.dtype}", tensor.dtype)
    check_matrix("block_tables", block_tables, (torch.int32, torch.int64))
    check_vector("context_lens", context_lens, (torch.int32,), block_tables.shape[0])
    if window is not None and window < 1:
        raise ShapeError("window", "None or at least 1", window)
    if softcap is not None and softcap <= 0:
        raise ShapeError("softcap", "None or above 0", softcap)
    check_devices(
        {"q": q, "keys": keys, "values": values, "block_tables": block_tables,
         "context_lens": context_lens, "out": out}
    )  # fmt: skip
    return out


def _check_decode(q: Tensor, block_tables: Tensor, config: DecodeConfig | None) -> None:
    if block_tables.shape[0] != q.shape[0]:
        raise ShapeError("block_tables", f"{q.shape[0]} rows", tuple(block_tables.shape))
    if config is not None and not 1 <= config.splits <= MAX_SPLITS:
        raise ShapeError("config.splits", f"1 to {MAX_SPLITS}", config.splits)


def _check_prefill(
    q: Tensor,
    keys: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    config: PrefillConfig | None,
) -> None:
    check_vector("query_starts", query_starts, (torch.int32,), block_tables.shape[0] + 1)
    check_devices({"q": q, "query_starts": query_starts})
    group = q.shape[1] // keys.shape[2]
    if config is not None and config.rows_m < group:
        raise ShapeError("config.rows_m", f"at least the {group} heads of a group", config.rows_m)


def _launch_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    out: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    max_context: int | None,
    config: DecodeConfig | None,
) -> Tensor:
    require_triton()
    from shoal.kernels.paged_attention.jit import attention_decode_kernel, attention_reduce_kernel

    rows, heads, head_dim = q.shape
    _, block_tokens, kv_heads, _ = keys.shape
    if rows == 0:
        return out
    dim = power_of_two(head_dim, 16)
    room = block_tables.shape[1] * block_tokens
    span = min(room, max_context or room, window or room)
    chosen = config or default_decode_config(
        rows * kv_heads, span, dim, keys.element_size(), processors(q.device)
    )
    splits = chosen.splits
    split_rows = rows if splits > 1 else 0  # what is not split leaves no partial results
    partial = q.new_empty((split_rows, heads, splits, head_dim), dtype=torch.float32)
    weight = q.new_empty((split_rows, heads, splits), dtype=torch.float32)
    attention_decode_kernel[(kv_heads, rows, splits)](
        q,
        keys,
        values,
        block_tables,
        context_lens,
        out,
        partial,
        weight,
        scale,
        window or 0,
        softcap or 0.0,
        splits,
        chosen.min_split,
        block_tables.stride(0),
        q.stride(0),
        q.stride(1),
        out.stride(0),
        keys.stride(1),
        keys.stride(2),
        GROUP=heads // kv_heads,
        ROWS_M=power_of_two(heads // kv_heads, 16),
        HEAD_DIM=head_dim,
        DIM=dim,
        BLOCK_TOKENS=block_tokens,
        TILE=chosen.tile,
        WINDOW=window is not None,
        SOFTCAP=softcap is not None,
        FLOAT32_DOT=dot_in_float32(keys.dtype),
        STAGES=chosen.num_stages,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    if splits > 1:
        attention_reduce_kernel[(heads, rows)](
            partial,
            weight,
            context_lens,
            out,
            window or 0,
            splits,
            chosen.min_split,
            out.stride(0),
            HEAD_DIM=head_dim,
            DIM=dim,
            TILE=chosen.tile,
            SPLITS=power_of_two(splits),
            WINDOW=window is not None,
        )
    return out


def _launch_prefill(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    out: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    config: PrefillConfig | None,
) -> Tensor:
    require_triton()
    from shoal.kernels.paged_attention.jit import attention_prefill_kernel

    tokens, heads, head_dim = q.shape
    _, block_tokens, kv_heads, _ = keys.shape
    rows = block_tables.shape[0]
    if tokens == 0 or rows == 0:
        return out
    group = heads // kv_heads
    dim = power_of_two(head_dim, 16)
    chosen = config or default_prefill_config(tokens, rows, group, dim, keys.element_size())
    tiles = tokens // (chosen.rows_m // group) + rows  # see the kernel
    attention_prefill_kernel[(kv_heads, tiles)](
        q,
        keys,
        values,
        block_tables,
        context_lens,
        query_starts,
        out,
        scale,
        window or 0,
        softcap or 0.0,
        rows,
        block_tables.stride(0),
        q.stride(0),
        q.stride(1),
        out.stride(0),
        keys.stride(1),
        keys.stride(2),
        GROUP=group,
        ROWS=row_class(rows),
        ROWS_M=chosen.rows_m,
        HEAD_DIM=head_dim,
        DIM=dim,
        BLOCK_TOKENS=block_tokens,
        TILE=chosen.tile,
        WINDOW=window is not None,
        SOFTCAP=softcap is not None,
        FLOAT32_DOT=dot_in_float32(keys.dtype),
        STAGES=chosen.num_stages,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    return out
