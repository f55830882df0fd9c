"""``grouped_matmul``: every token times its own adapter's matrix, tokens of one adapter together.

Serves the fold expand (``S_r(x) D``), the LoRA shrink (``x Aᵀ``) and the LoRA expand
(``(x Aᵀ) Bᵀ``). Owns argument checks, dispatch and launch shapes. Dispatch goes by device alone:
CPU tensors run the reference, GPU tensors the Triton kernel. ``launch_grouped_matmul`` always
launches; on CPU tensors that needs Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.kernels.errors import ShapeError, check_devices, check_matrix, check_vector
from shoal.kernels.grouped_matmul.reference import grouped_matmul_reference
from shoal.kernels.grouped_matmul.tiles import TilePlan
from shoal.kernels.launching import (
    ALIGNMENTS,
    FLOATS,
    dot_in_float32,
    require_triton,
)


class Tiles(NamedTuple):
    """A ``TilePlan`` on the device: ``starts`` and ``lengths`` are int32 ``(tiles,)``."""

    starts: Tensor
    lengths: Tensor
    tile_tokens: int


def upload_tiles(plan: TilePlan, device: torch.device) -> Tiles:
    """Copy a plan to ``device``."""
    both = torch.tensor([plan.starts, plan.lengths], dtype=torch.int32).to(device)
    return Tiles(both[0], both[1], plan.tile_tokens)


@dataclass(frozen=True, slots=True)
class MatmulConfig:
    """How to launch.

    Attributes:
        block_n: outputs per program.
        tile_k: inner elements per step where tokens share a tile (matrix units).
        single_k: inner elements per step for a tile of one token, which takes the plain
            arithmetic units. None: such tiles use the matrix units too, mostly empty.
        num_stages: inner steps in flight; 1 where a single step takes everything.
    """

    block_n: int
    tile_k: int
    single_k: int | None
    num_warps: int = 4
    num_stages: int = 3


def grouped_matmul(
    x: Tensor,
    arena: Tensor,
    addresses: Tensor,
    out: Tensor,
    *,
    row_stride: int,
    transposed: bool = False,
    ranks: Tensor | None = None,
    tiles: Tiles | None = None,
    alignment: int = 1,
    config: MatmulConfig | None = None,
) -> None:
    """Add each token's product: ``out[t] += x[t] @ M_t``, M_t somewhere in the arena.

    Row ``i`` of a stored matrix starts at element ``addresses[t] + i·row_stride``. As stored it is
    ``(k, n)``, or with ``transposed`` ``(n, k)``; it may be a window of columns of a wider one.

    Args:
        x: ``(tokens, k)``. Rows may be strided.
        arena: ``(elements,)``, all adapters. Read only.
        addresses: ``(tokens,)`` int64; -1 means no adapter: the token's out stays as it is.
        out: ``(tokens, n)``, in and out. Rows may be strided.
        row_stride: elements from one stored row to the next, at least the stored width.
        transposed: the stored rows are outputs, as in LoRA's A ``(r, d_in)``.
        ranks: ``(tokens,)`` int32, how many stored rows a token's matrix has; default all
            (``k``, or ``n`` when transposed). x or out beyond them is not touched.
        tiles: neighbouring tokens that share address and rank, from ``make_tiles`` and
            ``upload_tiles``; tokens in no tile are left out. Default: every token on its own.
        alignment: a number that divides every used address (1, 2, 4, 8 or 16). With 8 and a
            row stride that is a multiple of 16, loads are 16 bytes wide. A promise, not checked.
        config: launch parameters, for measurements; default by the sweep in ``bench.py``.

    x, arena and out are float32, float16 or bfloat16, each its own; sums are float32.
    Limit: where tokens share a tile, a float32 x is rounded to a 16-bit arena's dtype first.

    Raises:
        ShapeError: a shape, dtype, stride or device is wrong (names the argument).
        TritonMissing: the tensors are on a GPU and Triton is not installed.

    Cost: reads ``tiles·k·n + tokens·(k + n)`` elements and writes ``tokens·n``; memory bound.
    """
    _check(x, arena, addresses, out, row_stride, transposed, ranks, tiles, alignment)
    if x.device.type == "cpu":
        grouped_matmul_reference(
            x,
            arena,
            addresses,
            out,
            row_stride=row_stride,
            transposed=transposed,
            ranks=ranks,
            tiles=tiles,
        )
    else:
        _launch(x, arena, addresses, out, row_stride, transposed, ranks, tiles, alignment, config)


def launch_grouped_matmul(
    x: Tensor,
    arena: Tensor,
    addresses: Tensor,
    out: Tensor,
    *,
    row_stride: int,
    transposed: bool = False,
    ranks: Tensor | None = None,
    tiles: Tiles | None = None,
    alignment: int = 1,
    config: MatmulConfig | None = None,
) -> None:
    """``grouped_matmul`` through Triton on any device; CPU tensors need ``TRITON_INTERPRET=1``."""
    _check(x, arena, addresses, out, row_stride, transposed, ranks, tiles, alignment)
    _launch(x, arena, addresses, out, row_stride, transposed, ranks, tiles, alignment, config)


def default_config(
    tokens: int, tiles: int, n: int, *, transposed: bool, float32: bool = False
) -> MatmulConfig:
    """The launch parameters for ``tokens`` tokens in ``tiles`` tiles and ``n`` outputs.

    ``float32``: the arena is float32.
    """
    # Sweep on an H100, 2026-11 (results/h100-kernels.jsonl).
    # Expand: a pipeline (num_stages) of a single step costs twice the time (256 adapters, k = 16,
    # n = 4096: 53.8 µs with 3 stages, 24.4 without); few warps with much work each win, and 512
    # outputs by 2 warps are the fastest or within 10 % of it at every point.
    # A float32 arena takes less: the product runs on the plain units, and at 512 outputs the
    # compiler unrolls it into 0.5 MB of code, 5 s for each variant.
    if not transposed and float32:
        return MatmulConfig(block_n=128, tile_k=16, single_k=16, num_stages=1)
    if not transposed:
        return MatmulConfig(block_n=512, tile_k=16, single_k=16, num_warps=2, num_stages=1)
    if tokens >= 2 * tiles:
        # Most tiles hold several tokens. 16 tiles, n = 64: 16.2 µs, with the matrix-vector path
        # for single tokens compiled in 20.5. Many tiles and columns: 63.6 µs, with 16 columns 70.6.
        if tiles >= 128 and n >= 32:
            return MatmulConfig(block_n=32, tile_k=128, single_k=256)
        return MatmulConfig(block_n=16, tile_k=256, single_k=None)
    # Each token on its own: few tokens fill the GPU only with a program per output (1 token,
    # k = 4096: 6.2 µs, with 16 outputs per program 9.3; 16 tokens, k = 14336: 11.1 and 18.7).
    # From some hundred programs on, x read once for 4 outputs wins (256 tokens: 23.3, 25.0).
    if tiles * n <= 512:
        return MatmulConfig(block_n=1, tile_k=256, single_k=1024, num_stages=4)
    return MatmulConfig(block_n=4, tile_k=128, single_k=512)


def _check(
    x: Tensor,
    arena: Tensor,
    addresses: Tensor,
    out: Tensor,
    row_stride: int,
    transposed: bool,
    ranks: Tensor | None,
    tiles: Tiles | None,
    alignment: int,
) -> None:
    check_matrix("x", x, FLOATS)
    check_matrix("out", out, FLOATS)
    tokens, k = x.shape
    n = out.shape[1]
    if out.shape[0] != tokens:
        raise ShapeError("out", f"{tokens} rows", tuple(out.shape))
    if k == 0 or n == 0:
        raise ShapeError("x" if k == 0 else "out", "at least one column", 0)
    check_vector("arena", arena, FLOATS, None)
    check_vector("addresses", addresses, (torch.int64,), tokens)
    width = k if transposed else n
    if row_stride < width:
        raise ShapeError("row_stride", f"at least the stored width {width}", row_stride)
    if ranks is not None:
        check_vector("ranks", ranks, (torch.int32,), tokens)
    if tiles is not None:
        check_vector("tiles.starts", tiles.starts, (torch.int32,), None)
        check_vector("tiles.lengths", tiles.lengths, (torch.int32,), tiles.starts.shape[0])
    if alignment not in ALIGNMENTS:
        raise ShapeError("alignment", f"one of {ALIGNMENTS}", alignment)
    check_devices(
        {
            "x": x,
            "arena": arena,
            "addresses": addresses,
            "out": out,
            "ranks": ranks,
            "tiles.starts": None if tiles is None else tiles.starts,
            "tiles.lengths": None if tiles is None else tiles.lengths,
        }
    )


def _launch(
    x: Tensor,
    arena: Tensor,
    addresses: Tensor,
    out: Tensor,
    row_stride: int,
    transposed: bool,
    ranks: Tensor | None,
    tiles: Tiles | None,
    alignment: int,
    config: MatmulConfig | None,
) -> None:
    require_triton()
    from shoal.kernels.grouped_matmul.jit import grouped_matmul_kernel

    tokens, k = x.shape
    n = out.shape[1]
    num_tiles = tokens if tiles is None else tiles.starts.shape[0]
    if tokens == 0 or num_tiles == 0:
        return
    chosen = config or default_config(
        tokens, num_tiles, n, transposed=transposed, float32=arena.dtype == torch.float32
    )
    grouped_matmul_kernel[(num_tiles, -(-n // chosen.block_n))](
        x,
        arena,
        addresses,
        addresses if ranks is None else ranks,
        addresses if tiles is None else tiles.starts,
        addresses if tiles is None else tiles.lengths,
        out,
        k,
        n,
        row_stride,
        x.stride(0),
        out.stride(0),
        TRANSPOSED=transposed,
        HAS_RANKS=ranks is not None,
        HAS_TILES=tiles is not None,
        TILE=16 if tiles is None else tiles.tile_tokens,
        TILE_K=chosen.tile_k,
        SINGLE_K=chosen.single_k or 0,
        BLOCK_N=chosen.block_n,
        ALIGN=alignment,
        STAGES=chosen.num_stages,
        FLOAT32_DOT=dot_in_float32(arena.dtype),
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
