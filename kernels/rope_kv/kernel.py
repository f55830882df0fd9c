"""``rope_kv``: from the qkv GEMM's output to rotated queries and a filled cache.

Owns argument checks, dispatch and launch shapes. Dispatch goes by device alone: CPU tensors run
the reference, GPU tensors the Triton kernel. ``launch_rope_kv`` always launches; on CPU tensors
that needs Triton's interpreter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.kernels.core_apply.epilogue import (
    PROMPT_TOKENS,
    Epilogue,
    RowScale,
    check_epilogue,
    check_scale,
    default_tile,
    epilogue_arguments,
    scale_arguments,
)
from shoal.kernels.errors import ShapeError, check_devices, check_matrix, check_vector
from shoal.kernels.launching import (
    FLOATS,
    TileConfig,
    overlap_options,
    power_of_two,
    require_triton,
)
from shoal.kernels.rope_kv.reference import KV_LIMIT, cache_limit, rope_kv_reference


def rope_kv(
    qkv: Tensor,
    heads: int,
    positions: Tensor,
    rotations: Tensor,
    slot_mapping: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    kv_limit: float = KV_LIMIT,
    core: Epilogue | None = None,
    scale: RowScale | None = None,
    early: bool = True,
    config: TileConfig | None = None,
) -> Tensor:
    """Deltas, factor, bias, limit, norm, rotation; k and v go to the cache, q is returned.

    Args:
        qkv: ``(tokens, (heads + 2·kv_heads)·head_dim or more)``: q, k, v, and whatever the GEMM
            was widened by, which only ``core`` reads. Rows may be strided.
        heads: of q.
        positions: ``(tokens,)`` int64, each token's row of ``rotations``.
        rotations: ``(rows, head_dim)`` float, cos beside sin (``reference.rotation_table``); the
            pairs are ``(i, i + head_dim / 2)``.
        slot_mapping: ``(tokens,)`` int64, ``block·block_tokens + offset``, all different; a token
            with -1 (padding) is not written.
        key_cache, value_cache: ``(num_blocks, block_tokens, kv_heads, head_dim)``, in and out, of
            one dtype and the same strides, the last axis contiguous.
        q_norm, k_norm: ``(head_dim,)``: weights of RMS norms over each head of q and k, with eps
            ``eps``; both or none.
        bias: as wide as q, k and v together, added after the deltas and the factor.
        kv_limit: k and v are clamped to it (and to the cache's dtype) in size, NaN to 0, so that
            a row that overflows leaves nothing behind that another row's mask cannot hide.
        core: the adapters of q, k and v, or None when no token of the step has one.
        scale: the factor of each row of ``y0 + δ`` (a deferred norm), or None: 1.
        early: see ``launching.overlap_options``; False where the call before writes the tables,
            ``positions``, ``slot_mapping`` and ``rotations`` among them.
        config: launch parameters, for measurements; ``block_n`` columns are whole heads.

    Floats are float32, float16 or bfloat16, each its own; the arithmetic is float32.

    Returns:
        q ``(tokens, heads, head_dim)`` in qkv's dtype, newly allocated.

    Raises:
        ShapeError: a shape, dtype, stride or device is wrong (names the argument).
        TritonMissing: the tensors are on a GPU and Triton is not installed.

    Cost: with n outputs, reads ``tokens·(n + head_dim·2)`` and writes ``tokens·n`` elements (the
    rotations are 4 bytes each); the adapters add ``tokens·3·columns + Σ_distinct 3·r² +
    n·columns`` read. Memory bound.
    """
    _check(qkv, heads, positions, rotations, slot_mapping, key_cache, value_cache)
    _check_optional(qkv, heads, key_cache, q_norm, k_norm, bias, core, scale)
    arguments = (qkv, heads, positions, rotations, slot_mapping, key_cache, value_cache)
    if qkv.device.type == "cpu":
        return rope_kv_reference(*arguments, q_norm, k_norm, eps, bias, kv_limit, core, scale)
    return _launch(*arguments, q_norm, k_norm, eps, bias, kv_limit, core, scale, early, config)


def launch_rope_kv(
    qkv: Tensor,
    heads: int,
    positions: Tensor,
    rotations: Tensor,
    slot_mapping: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    bias: Tensor | None = None,
    kv_limit: float = KV_LIMIT,
    core: Epilogue | None = None,
    scale: RowScale | None = None,
    early: bool = True,
    config: TileConfig | None = None,
) -> Tensor:
    """``rope_kv`` through Triton on any device; CPU tensors need ``TRITON_INTERPRET=1``."""
    _check(qkv, heads, positions, rotations, slot_mapping, key_cache, value_cache)
    _check_optional(qkv, heads, key_cache, q_norm, k_norm, bias, core, scale)
    arguments = (qkv, heads, positions, rotations, slot_mapping, key_cache, value_cache)
    return _launch(*arguments, q_norm, k_norm, eps, bias, kv_limit, core, scale, early, config)


def default_config(core: Epilogue | None, tokens: int) -> TileConfig:
    """The launch parameters, with or without adapters."""
    if core is None:
        return TileConfig(4, 512, 4)
    if tokens <= PROMPT_TOKENS:
        # Swept inside a captured decode step of Llama-3.1-8B (H100, rank 16).
        return TileConfig(16, 64, 4) if tokens <= 48 else TileConfig(16, 256, 8)
    return default_tile(core, tokens)


def _check(
    qkv: Tensor,
    heads: int,
    positions: Tensor,
    rotations: Tensor,
    slot_mapping: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
) -> None:
    check_matrix("qkv", qkv, FLOATS)
    tokens = qkv.shape[0]
    if key_cache.dim() != 4 or key_cache.shape[3] % 2 or key_cache.stride(3) != 1:
        rule = "(blocks, block_tokens, kv_heads, an even head_dim), the last axis contiguous"
        raise ShapeError("key_cache", rule, f"{tuple(key_cache.shape)} {key_cache.stride()}")
    if key_cache.dtype not in FLOATS:
        raise ShapeError("key_cache", f"a dtype of {FLOATS}", key_cache.dtype)
    same = (key_cache.shape, key_cache.stride(), key_cache.dtype)
    if (value_cache.shape, value_cache.stride(), value_cache.dtype) != same:
        raise ShapeError(
            "value_cache", "shape, strides and dtype of key_cache", tuple(value_cache.shape)
        )
    kv_heads, head_dim = key_cache.shape[2:]
    if heads < 1:
        raise ShapeError("heads", "at least 1", heads)
    least = (heads + 2 * kv_heads) * head_dim
    if qkv.shape[1] < least:
        raise ShapeError("qkv", f"at least {least} columns", tuple(qkv.shape))
    check_vector("positions", positions, (torch.int64,), tokens)
    check_vector("slot_mapping", slot_mapping, (torch.int64,), tokens)
    check_matrix("rotations", rotations, FLOATS)
    if rotations.shape[1] != head_dim:
        raise ShapeError("rotations", f"{head_dim} columns", tuple(rotations.shape))
    check_devices(
        {
            "qkv": qkv,
            "positions": positions,
            "rotations": rotations,
            "slot_mapping": slot_mapping,
            "key_cache": key_cache,
            "value_cache": value_cache,
        }
    )


def _check_optional(
    qkv: Tensor,
    heads: int,
    key_cache: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    bias: Tensor | None,
    core: Epilogue | None,
    scale: RowScale | None,
) -> None:
    kv_heads, head_dim = key_cache.shape[2:]
    widths = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    if (q_norm is None) != (k_norm is None):
        raise ShapeError("k_norm", "a value exactly when q_norm has one", k_norm)
    for name, vector, length in (
        ("q_norm", q_norm, head_dim),
        ("k_norm", k_norm, head_dim),
        ("bias", bias, sum(widths)),
    ):
        if vector is not None:
            check_vector(name, vector, FLOATS, length)
            if vector.device != qkv.device:
                raise ShapeError(name, "the device of qkv", vector.device)
    if core is not None:
        check_epilogue(core, "qkv", qkv, widths)
    if scale is not None:
        check_scale(scale, "qkv", qkv)


def _launch(
    qkv: Tensor,
    heads: int,
    positions: Tensor,
    rotations: Tensor,
    slot_mapping: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    bias: Tensor | None,
    kv_limit: float,
    core: Epilogue | None,
    scale: RowScale | None,
    early: bool,
    config: TileConfig | None,
) -> Tensor:
    require_triton()
    from shoal.kernels.rope_kv.jit import rope_kv_kernel

    tokens = qkv.shape[0]
    block_tokens, kv_heads, head_dim = key_cache.shape[1:]
    q = torch.empty((tokens, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if tokens == 0:
        return q
    chosen = config or default_config(core, tokens)
    half = power_of_two(head_dim // 2)
    # tl.dot wants 16 outputs; more heads than there are only cost.
    least = max(1, 16 // half)
    together = max(least, min(chosen.block_n // (2 * half), power_of_two(heads)))
    programs = -(-heads // together) + 2 * -(-kv_heads // together)
    rope_kv_kernel[(-(-tokens // chosen.tile), programs)](
        qkv_ptr=qkv,
        bias_ptr=bias,
        positions_ptr=positions,
        rotations_ptr=rotations,
        slots_ptr=slot_mapping,
        q_ptr=q,
        key_cache_ptr=key_cache,
        value_cache_ptr=value_cache,
        q_norm_ptr=q_norm,
        k_norm_ptr=k_norm,
        tokens=tokens,
        heads=heads,
        kv_heads=kv_heads,
        block_tokens=block_tokens,
        qkv_stride=qkv.stride(0),
        rotations_stride=rotations.stride(0),
        block_stride=key_cache.stride(0),
        position_stride=key_cache.stride(1),
        head_stride=key_cache.stride(2),
        eps=eps,
        limit=cache_limit(key_cache.dtype, kv_limit),
        **epilogue_arguments(core),
        **scale_arguments(scale),
        HEAD_DIM=head_dim,
        HALF=half,
        HEADS=together,
        TILE=chosen.tile,
        **overlap_options(qkv.device, early),
        num_warps=chosen.num_warps,
    )
    return q
