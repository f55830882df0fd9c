"""``shrink`` and ``expand``: each token multiplied with the matrix of its own adapter.

They are the MiSS expand (``S_r(x) D``) and both halves of a LoRA (``x Aᵀ``, then ``· Bᵀ``). Which
token uses what is a table on the device (``TileTable``), and the grid depends on its size alone:
a launch may be captured in a graph and replayed over a table that was filled anew.

Owns argument checks, dispatch and launch shapes. Dispatch goes by device alone: CPU tensors run
the reference, GPU tensors the Triton kernels. ``launch_shrink`` and ``launch_expand`` always
launch; on CPU tensors that needs Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.kernels.errors import ShapeError, check_devices, check_matrix, check_vector
from shoal.kernels.grouped_matmul.reference import expand_reference, shrink_reference
from shoal.kernels.grouped_matmul.tiles import TILE_TOKENS, TilePlan
from shoal.kernels.launching import (
    ALIGNMENTS,
    FLOATS,
    dot_in_float32,
    overlap_options,
    require_triton,
)

MODULES_MAX = 3


class TileTable(NamedTuple):
    """Which neighbouring tokens share an adapter: one entry for each tile, on the device.

    Attributes:
        starts: ``(tiles,)`` int32, the first token.
        lengths: ``(tiles,)`` int32, 0 to 16 tokens. 0: the tile is not used, its programs end at
            once. Used tiles do not overlap.
        addresses: ``(tiles,)`` int64, where the record of the tile's adapter starts in the arena.
        ranks: ``(tiles,)`` int32, its rank.
    """

    starts: Tensor
    lengths: Tensor
    addresses: Tensor
    ranks: Tensor


def upload_tiles(plan: TilePlan, device: torch.device, capacity: int | None = None) -> TileTable:
    """Copy a plan to ``device``, with unused tiles up to ``capacity``."""
    missing = (capacity or 0) - len(plan.starts)
    padded = [[*column, *(0,) * missing] for column in plan]
    starts, lengths, addresses, ranks = (
        torch.tensor(column, dtype=dtype, device=device)
        for column, dtype in zip(
            padded, (torch.int32, torch.int32, torch.int64, torch.int32), strict=True
        )
    )
    return TileTable(starts, lengths, addresses, ranks)


@dataclass(frozen=True, slots=True)
class ShrinkConfig:
    """How to launch.

    Attributes:
        tile_n, tile_k: outputs per program, and inputs per step, where tokens share a tile (matrix
            units).
        single_n, single_k: the same for a tile of one token, which takes the plain arithmetic
            units; ``single_n`` divides ``tile_n``. None: such tiles use the matrix units too,
            mostly empty.
        num_stages: steps in flight.
    """

    tile_n: int
    tile_k: int
    single_n: int | None
    single_k: int | None
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True, slots=True)
class ExpandConfig:
    """How to launch.

    Attributes:
        block_n: outputs per program.
        tile_k: ranks per step.
        single: whether a tile of one token takes the plain arithmetic units.
    """

    block_n: int = 512
    tile_k: int = 16
    single: bool = True
    num_warps: int = 2


def shrink(
    x: Tensor,
    arena: Tensor,
    tiles: TileTable,
    out: Tensor,
    *,
    modules: int,
    scale: int,
    alignment: int = 1,
    config: ShrinkConfig | None = None,
) -> None:
    """Write each token's products with the rows of its adapter: ``out[t, i] = x[t] · M_t[i]``.

    ``M_t`` lies densely as ``(modules·rank, k)`` at element ``address + rank·scale`` of the
    arena: in a record that is packed at one rank, everything lies at a multiple of the rank.

    Args:
        x: ``(tokens, k)``. Rows may be strided.
        arena: ``(elements,)``, all adapters. Read only.
        tiles: which tokens use what. Tokens in no tile are left out.
        out: ``(tokens, n)``. Columns from ``modules·rank`` on keep what they hold. Rows may be
            strided.
        modules: matrices of ``rank`` rows, one below the other.
        scale: see above.
        alignment: a number that divides every ``address + rank·scale`` (1, 2, 4, 8 or 16). From 8
            on, with ``k`` a multiple of 16, loads are 16 bytes wide. A promise, not checked.
        config: launch parameters, for measurements; default by the sweep in ``bench.py``.

    x, arena and out are float32, float16 or bfloat16, each its own; sums are float32. Promises
    that cannot be checked without a synchronisation: ``modules·rank <= n`` for every tile, and
    that the matrices lie inside the arena.
    Limit: where tokens share a tile, a float32 x is rounded to a 16-bit arena's dtype first.

    Raises:
        ShapeError: a shape, dtype, stride or device is wrong (names the argument).
        TritonMissing: the tensors are on a GPU and Triton is not installed.

    Cost: reads the used rows of M once per tile, x and out once; memory bound.
    """
    _check(x, arena, tiles, out, scale, alignment)
    _check_modules(modules)
    if x.device.type == "cpu":
        shrink_reference(x, arena, tiles, out, modules=modules, scale=scale)
    else:
        _launch_shrink(x, arena, tiles, out, modules, scale, alignment, config)


def launch_shrink(
    x: Tensor,
    arena: Tensor,
    tiles: TileTable,
    out: Tensor,
    *,
    modules: int,
    scale: int,
    alignment: int = 1,
    config: ShrinkConfig | None = None,
) -> None:
    """``shrink`` through Triton on any device; CPU tensors need ``TRITON_INTERPRET=1``."""
    _check(x, arena, tiles, out, scale, alignment)
    _check_modules(modules)
    _launch_shrink(x, arena, tiles, out, modules, scale, alignment, config)


def expand(
    x: Tensor,
    arena: Tensor,
    tiles: TileTable,
    out: Tensor,
    *,
    widths: Sequence[int],
    scale: int,
    alignment: int = 1,
    early: bool = False,
    config: ExpandConfig | None = None,
) -> None:
    """Add each token's product, module by module: ``out[t, c_m] += x[t, m·r:][:r] M_t[:, c_m]``.

    ``M_t`` lies densely as ``(rank, sum(widths))`` at element ``address + rank·scale`` of the
    arena; ``c_m`` are the ``widths[m]`` columns of module m, and ``r`` is the token's rank.

    Args:
        x: ``(tokens, columns)``; for each module the token's ``rank`` inputs, side by side. Columns
            behind them are not read. Rows may be strided.
        out: ``(tokens, sum(widths))``, in and out. Rows may be strided.
        widths: outputs of each module, at most 3. With one module all outputs have the same inputs.
        arena, tiles, scale, alignment, config: as for ``shrink``; wide loads need widths that are
            multiples of 16.
        early: see ``launching.overlap_options``.

    Dtypes, promises, limit, errors and cost are those of ``shrink``.
    """
    _check(x, arena, tiles, out, scale, alignment)
    _check_widths(widths, out)
    if x.device.type == "cpu":
        expand_reference(x, arena, tiles, out, widths=widths, scale=scale)
    else:
        _launch_expand(x, arena, tiles, out, widths, scale, alignment, early, config)


def launch_expand(
    x: Tensor,
    arena: Tensor,
    tiles: TileTable,
    out: Tensor,
    *,
    widths: Sequence[int],
    scale: int,
    alignment: int = 1,
    early: bool = False,
    config: ExpandConfig | None = None,
) -> None:
    """``expand`` through Triton on any device; CPU tensors need ``TRITON_INTERPRET=1``."""
    _check(x, arena, tiles, out, scale, alignment)
    _check_widths(widths, out)
    _launch_expand(x, arena, tiles, out, widths, scale, alignment, early, config)


def default_shrink_config(tokens: int, tiles: int, n: int) -> ShrinkConfig:
    """The launch parameters for ``tokens`` tokens, a table of ``tiles`` tiles and ``n`` outputs."""
    # Sweep on an H100, 2026-11 (results/h100-kernels.jsonl, then with one rank per launch).
    if tokens >= 2 * tiles:
        # Prompts: most tiles hold several tokens. 16 tiles, n = 64: 16.2 µs, with the
        # matrix-vector path for single tokens compiled in 20.5. Many tiles and columns: 63.6 µs,
        # with 16 columns 70.6.
        wide = tiles >= 128 and n >= 32
        return ShrinkConfig(32 if wide else 16, 128 if wide else 256, None, None)
    # Each token may be on its own: few tokens fill the GPU only with a program per output (1 token,
    # k = 4096: 6.2 µs, with 16 outputs per program 9.3; 16 tokens, k = 14336: 11.1 and 18.7).
    # From some hundred programs on, x read once for 4 outputs wins (256 tokens: 23.3, 25.0).
    # Steps of 128 where tiles are shared: of 256 they would take so much shared memory that half as
    # many programs run at a time, whichever path they take.
    if tiles * n <= 512:
        return ShrinkConfig(16, 128, 1, 1024, num_stages=4)
    return ShrinkConfig(16, 128, 4, 512)


def default_expand_config(*, float32: bool = False) -> ExpandConfig:
    """The launch parameters; ``float32``: the arena is float32."""
    # Sweep on an H100, 2026-11: few warps with much work each win. All expands of a decode step of
    # 256 fold adapters of rank 16, behind GEMMs: 4.86 ms with 512 outputs by two warps, 6.90 by
    # four; 4.71 started early. Nothing else came below that: one warp (and then tiles of several
    # tokens spill), 1024 outputs, programs of 4 to 28 blocks with 2 to 4 of them in flight (4.8 to
    # 6.4), blocks of one matrix side by side (5.04), or beside the GEMM instead of behind it.
    # A float32 arena takes less: the product runs on the plain units, and at 512 outputs the
    # compiler unrolls it into 0.5 MB of code, 5 s for each variant.
    return ExpandConfig(block_n=128, num_warps=4) if float32 else ExpandConfig()


def _check(
    x: Tensor, arena: Tensor, tiles: TileTable, out: Tensor, scale: int, alignment: int
) -> None:
    check_matrix("x", x, FLOATS)
    check_matrix("out", out, FLOATS)
    if out.shape[0] != x.shape[0]:
        raise ShapeError("out", f"{x.shape[0]} rows", tuple(out.shape))
    if x.shape[1] == 0:
        raise ShapeError("x", "at least one column", 0)
    check_vector("arena", arena, FLOATS, None)
    check_vector("tiles.starts", tiles.starts, (torch.int32,), None)
    count = tiles.starts.shape[0]
    check_vector("tiles.lengths", tiles.lengths, (torch.int32,), count)
    check_vector("tiles.addresses", tiles.addresses, (torch.int64,), count)
    check_vector("tiles.ranks", tiles.ranks, (torch.int32,), count)
    if scale < 0:
        raise ShapeError("scale", "at least 0", scale)
    if alignment not in ALIGNMENTS:
        raise ShapeError("alignment", f"one of {ALIGNMENTS}", alignment)
    check_devices(
        {
            "x": x,
            "arena": arena,
            "out": out,
            "tiles.starts": tiles.starts,
            "tiles.lengths": tiles.lengths,
            "tiles.addresses": tiles.addresses,
            "tiles.ranks": tiles.ranks,
        }
    )


def _check_modules(modules: int) -> None:
    if modules < 1:
        raise ShapeError("modules", "at least 1", modules)


def _check_widths(widths: Sequence[int], out: Tensor) -> None:
    if not 1 <= len(widths) <= MODULES_MAX or min(widths) < 1:
        raise ShapeError("widths", f"1 to {MODULES_MAX} positive numbers", tuple(widths))
    if out.shape[1] != sum(widths):
        raise ShapeError("out", f"{sum(widths)} columns", tuple(out.shape))


def _launch_shrink(
    x: Tensor,
    arena: Tensor,
    tiles: TileTable,
    out: Tensor,
    modules: int,
    scale: int,
    alignment: int,
    config: ShrinkConfig | None,
) -> None:
    require_triton()
    from shoal.kernels.grouped_matmul.jit import shrink_kernel

    tokens, k = x.shape
    n = out.shape[1]
    count = tiles.starts.shape[0]
    if tokens == 0 or count == 0:
        return
    chosen = config or default_shrink_config(tokens, count, n)
    single_n = chosen.single_n or chosen.tile_n
    blocks = -(-n // single_n)
    shrink_kernel[(count, blocks)](
        x,
        arena,
        *tiles,
        out,
        k,
        modules,
        scale,
        x.stride(0),
        out.stride(0),
        TILE=TILE_TOKENS,
        TILE_N=chosen.tile_n,
        TILE_K=chosen.tile_k,
        SINGLE_N=single_n,
        SINGLE_K=chosen.single_k or 0,
        ALIGN=alignment,
        STAGES=chosen.num_stages,
        FLOAT32_DOT=dot_in_float32(arena.dtype),
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )


def _launch_expand(
    x: Tensor,
    arena: Tensor,
    tiles: TileTable,
    out: Tensor,
    widths: Sequence[int],
    scale: int,
    alignment: int,
    early: bool,
    config: ExpandConfig | None,
) -> None:
    require_triton()
    from shoal.kernels.grouped_matmul.jit import expand_kernel

    count = tiles.starts.shape[0]
    if x.shape[0] == 0 or count == 0:
        return
    chosen = config or default_expand_config(float32=arena.dtype == torch.float32)
    blocks = sum(-(-width // chosen.block_n) for width in widths)
    expand_kernel[(count, blocks)](
        x,
        arena,
        *tiles,
        out,
        *widths,
        *(0,) * (MODULES_MAX - len(widths)),
        scale,
        x.stride(0),
        out.stride(0),
        TILE=TILE_TOKENS,
        TILE_K=chosen.tile_k,
        BLOCK_N=chosen.block_n,
        SINGLE=chosen.single,
        ALIGN=alignment,
        FLOAT32_DOT=dot_in_float32(arena.dtype),
        **overlap_options(out.device, early),
        num_warps=chosen.num_warps,
        num_stages=1,
    )
