"""``core_project`` and ``core_mix``: ``u = h Rᵀ`` made apart from the kernel that adds ``u Bᵀ``.

``core_project`` also makes ``h = x Aᵀ``, for a GEMM that is better not widened: it runs beside the
GEMM, on another stream. ``core_mix`` finds h in the widened GEMM's output, for prompts, where a
fused kernel would read and mix R again for every tile of outputs. What they return goes into a
``MixedEpilogue``.

Owns argument checks, dispatch and launch shapes. Dispatch goes by device alone: CPU tensors run
the reference, GPU tensors the Triton kernels. ``launch_…`` always launches; on CPU tensors that
needs Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.core_apply.epilogue import CHUNK, CoreRows, rows_arguments
from shoal.kernels.core_project.reference import core_mix_reference, core_project_reference
from shoal.kernels.errors import ShapeError, check_matrix
from shoal.kernels.launching import (
    FLOATS,
    dot_in_float32,
    overlap_options,
    power_of_two,
    require_triton,
)


@dataclass(frozen=True, slots=True)
class ProjectConfig:
    """How to launch ``core_project``.

    A program takes ``tile`` tokens, and one of at most ``splits`` runs of ``block_k``s of x.
    """

    splits: int = 1
    block_k: int = 128
    num_warps: int = 8
    num_stages: int = 4
    tile: int = 64


@dataclass(frozen=True, slots=True)
class MixConfig:
    """How to launch ``core_mix``: tokens per program."""

    tile: int = 4
    num_warps: int = 1


def core_project(
    x: Tensor,
    projection: Tensor,
    rows: CoreRows,
    *,
    modules: int,
    matrix: int,
    early: bool = True,
    config: ProjectConfig | None = None,
) -> Tensor:
    """``u[t, m] = (x[t] A_mᵀ) R_{t,m}ᵀ``, in parts that the consumer sums.

    Mixing is linear, so every split of the inner dimension mixes its own partial h: no second
    kernel and no atomics.

    Args:
        x: ``(tokens, k)``, the GEMM's input. Rows may be strided.
        projection: ``(modules·columns or more, k)``, rows of ``A = BᵀW`` in the order of the
            widened weight: blocks of 16 columns of the basis, module after module in each.
        rows: the adapters; ``rows.columns`` rows of A are used for each module.
        modules: how many share x.
        matrix: which matrix of a record belongs to the first module; the others follow.
        early: see ``launching.overlap_options``; False where the call before writes the tables.
        config: launch parameters, for measurements.

    Floats are float32, float16 or bfloat16, each its own; sums are float32.

    Returns:
        ``(splits, tokens, modules, columns)`` float32, newly allocated, for ``MixedEpilogue``;
        zero where a token's adapter has no column.

    Raises:
        ShapeError: a shape, dtype, stride or device is wrong (names the argument).
        TritonMissing: the tensors are on a GPU and Triton is not installed.

    Cost: reads ``modules`` times x, ``modules·columns·k`` for every 16 tokens, and R for every
    split, all but once from the L2 cache. Bound by latency.
    """
    _check_project(x, projection, rows, modules, matrix)
    if x.device.type == "cpu":
        return core_project_reference(x, projection, rows, modules, matrix)
    return _launch_project(x, projection, rows, modules, matrix, early, config)


def launch_core_project(
    x: Tensor,
    projection: Tensor,
    rows: CoreRows,
    *,
    modules: int,
    matrix: int,
    early: bool = True,
    config: ProjectConfig | None = None,
) -> Tensor:
    """``core_project`` through Triton on any device; CPU tensors need ``TRITON_INTERPRET=1``."""
    _check_project(x, projection, rows, modules, matrix)
    return _launch_project(x, projection, rows, modules, matrix, early, config)


def core_mix(
    y: Tensor,
    h_column: int,
    rows: CoreRows,
    *,
    modules: int,
    matrix: int,
    early: bool = True,
    config: MixConfig | None = None,
) -> Tensor:
    """``u[t, m] = h[t, m] R_{t,m}ᵀ`` for h that lies in a widened GEMM's output.

    Args:
        y: ``(tokens, h_column + modules·columns or more)``, the output. Rows may be strided.
        h_column: where h starts in a row, in the order of ``CoreEpilogue``.
        rows: the adapters.
        modules: how many the GEMM has.
        matrix: which matrix of a record belongs to the first module; the others follow.
        early: see ``launching.overlap_options``; False where the call before writes the tables.
        config: launch parameters, for measurements.

    Floats are float32, float16 or bfloat16, each its own; sums are float32.

    Returns:
        ``(1, tokens, modules, columns)`` float32, newly allocated, for ``MixedEpilogue``; zero
        where a token's adapter has no column.

    Raises:
        ShapeError: a shape, dtype, stride or device is wrong (names the argument).
        TritonMissing: the tensors are on a GPU and Triton is not installed.

    Cost: reads ``tokens·modules·(columns + r²)`` (R of neighbours with one adapter from the
    caches) and writes ``tokens·modules·columns`` in float32. Bound by latency.
    """
    _check_mix(y, h_column, rows, modules, matrix)
    if y.device.type == "cpu":
        return core_mix_reference(y, h_column, rows, modules, matrix)
    return _launch_mix(y, h_column, rows, modules, matrix, early, config)


def launch_core_mix(
    y: Tensor,
    h_column: int,
    rows: CoreRows,
    *,
    modules: int,
    matrix: int,
    early: bool = True,
    config: MixConfig | None = None,
) -> Tensor:
    """``core_mix`` through Triton on any device; CPU tensors need ``TRITON_INTERPRET=1``."""
    _check_mix(y, h_column, rows, modules, matrix)
    return _launch_mix(y, h_column, rows, modules, matrix, early, config)


def default_project_config(columns: int, tokens: int, dtype: torch.dtype) -> ProjectConfig:
    """The launch parameters of ``core_project``."""
    if dtype == torch.float32:  # plain arithmetic: for checks against the CPU, not for speed
        return ProjectConfig(tile=16)
    # Beside decode's gate_up GEMM (H100, k 4096). As few programs as there can be, each of which
    # takes a processor from the GEMM, while they end before it does: at 128 tokens and 16 columns
    # the step takes 8.09 ms with one program of 70 us, 8.26 with eight of 27 us. One split: every
    # program of the consumer reads all splits.
    if columns > 32:
        return ProjectConfig(num_stages=3, tile=16)
    if tokens <= 64:
        return ProjectConfig()
    if columns > 16 and tokens <= 128:
        # One program of 128 tokens takes 100 us, the GEMM 89 (step 8.64 ms; two splits 8.8; this
        # 8.54).
        return ProjectConfig(block_k=256, tile=16)
    return ProjectConfig(tile=128)


def mixed_rows(tile: int, columns: int) -> int:
    """Rows of R that ``core_project`` mixes at a time: what 8 warps keep in registers."""
    return max(1, min(16, 16384 // (tile * columns)))


def default_mix_config(columns: int) -> MixConfig:
    """The launch parameters of ``core_mix``."""
    # Not swept yet: what a thread holds of R stays the same.
    return MixConfig(tile=4, num_warps=columns // 16)


def _check_rows(source: Tensor, argument: str, rows: CoreRows, modules: int, matrix: int) -> None:
    if rows.addresses.shape[0] != source.shape[0]:
        raise ShapeError("addresses", f"shape ({source.shape[0]},)", tuple(rows.addresses.shape))
    if rows.arena.device != source.device:
        raise ShapeError("arena", f"the device of {argument}", rows.arena.device)
    if modules < 1:
        raise ShapeError("modules", "at least 1", modules)
    if matrix < 0:
        raise ShapeError("matrix", "at least 0", matrix)


def _check_project(
    x: Tensor, projection: Tensor, rows: CoreRows, modules: int, matrix: int
) -> None:
    check_matrix("x", x, FLOATS)
    check_matrix("projection", projection, FLOATS)
    least, k = modules * rows.columns, x.shape[1]
    if projection.shape[0] < least or projection.shape[1] != k or k < 1:
        raise ShapeError("projection", f"shape ({least} or more, {k})", tuple(projection.shape))
    if projection.device != x.device:
        raise ShapeError("projection", "the device of x", projection.device)
    _check_rows(x, "x", rows, modules, matrix)


def _check_mix(y: Tensor, h_column: int, rows: CoreRows, modules: int, matrix: int) -> None:
    check_matrix("y", y, FLOATS)
    if h_column < 0:
        raise ShapeError("h_column", "at least 0", h_column)
    end = h_column + modules * rows.columns
    if y.shape[1] < end:
        raise ShapeError("y", f"at least {end} columns, h included", tuple(y.shape))
    _check_rows(y, "y", rows, modules, matrix)


def _launch_project(
    x: Tensor,
    projection: Tensor,
    rows: CoreRows,
    modules: int,
    matrix: int,
    early: bool,
    config: ProjectConfig | None,
) -> Tensor:
    require_triton()
    from shoal.kernels.core_project.jit import core_project_kernel

    tokens, k = x.shape
    chosen = config or default_project_config(rows.columns, tokens, x.dtype)
    blocks = -(-k // chosen.block_k)
    steps = -(-blocks // chosen.splits)
    splits = -(-blocks // steps)
    shape = (splits, tokens, modules, rows.columns)
    mixed = torch.empty(shape, dtype=torch.float32, device=x.device)
    tile = min(chosen.tile, power_of_two(tokens, least=16))
    if tokens == 0:
        return mixed
    core_project_kernel[(-(-tokens // tile), splits)](
        x_ptr=x,
        projection_ptr=projection,
        mixed_ptr=mixed,
        tokens=tokens,
        k=k,
        x_stride=x.stride(0),
        projection_stride=projection.stride(0),
        matrix=matrix,
        **rows_arguments(rows),
        MODULES=modules,
        WIDTH=power_of_two(modules) * rows.columns,
        TILE=tile,
        BLOCK_K=chosen.block_k,
        STEPS=steps,
        ROWS=mixed_rows(tile, rows.columns),
        FLOAT32_DOT=dot_in_float32(x.dtype, projection.dtype),
        **overlap_options(x.device, early),
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    return mixed


def _launch_mix(
    y: Tensor,
    h_column: int,
    rows: CoreRows,
    modules: int,
    matrix: int,
    early: bool,
    config: MixConfig | None,
) -> Tensor:
    require_triton()
    from shoal.kernels.core_project.jit import core_mix_rows_kernel

    tokens = y.shape[0]
    shape = (1, tokens, modules, rows.columns)
    mixed = torch.empty(shape, dtype=torch.float32, device=y.device)
    if tokens == 0:
        return mixed
    chosen = config or default_mix_config(rows.columns)
    core_mix_rows_kernel[(-(-tokens // chosen.tile), rows.columns // CHUNK, modules)](
        y_ptr=y,
        mixed_ptr=mixed,
        tokens=tokens,
        y_stride=y.stride(0),
        h_column=h_column,
        matrix=matrix,
        **rows_arguments(rows),
        MODULES=modules,
        TILE=chosen.tile,
        **overlap_options(y.device, early),
        num_warps=chosen.num_warps,
    )
    return mixed
