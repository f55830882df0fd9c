"""LoRA-XS for kernels that add it while they read a GEMM's output, and the deferred norm.

Owns the arguments those kernels share (``CoreRows``, ``CoreEpilogue``, ``MixedEpilogue``,
``RowScale``), their checks and what they mean in plain torch. The device code is in ``jit.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.errors import ShapeError, check_devices, check_vector
from shoal.kernels.launching import (
    ALIGNMENTS,
    FLOATS,
    TileConfig,
    dot_in_float32,
    power_of_two,
)

CHUNK = 16  # columns of one module that lie together in h
COLUMNS = (16, 32, 64)
INLINE_COLUMNS = (16, 32)  # R of 64 columns does not fit the registers of a tile
MAX_PARTS = 64
PROMPT_TOKENS = 512  # beyond: tiles so large that the basis is not read again for every 16 tokens


@dataclass(frozen=True, slots=True)
class CoreRows:
    """Which LoRA-XS adapter each token of a step has. Made once a step, and checked then.

    Attributes:
        arena: ``(elements,)``, all adapters; the scale is folded into R.
        addresses: ``(tokens,)`` int64, where each token's record starts in the arena; -1: none.
            Matrix ``i`` of a record lies ``i·rank²`` elements behind its start.
        ranks: ``(tokens,)`` int32; ignored without adapter.
        firsts: ``(tokens,)`` int32: a token uses the columns ``first … first + rank`` of the
            joint basis (and of h); ignored without adapter.
        columns: how many columns of the joint basis the step reads: 16, 32 or 64. A promise:
            ``first + rank <= columns`` for every token with an adapter.
        alignment: divides every used address, rank and first (1, 2, 4, 8 or 16). A promise.

    Raises:
        ShapeError: a shape, dtype, stride or device is wrong (names the argument).
    """

    arena: Tensor
    addresses: Tensor
    ranks: Tensor
    firsts: Tensor
    columns: int
    alignment: int = 1

    def __post_init__(self) -> None:
        check_vector("arena", self.arena, FLOATS, None)
        check_vector("addresses", self.addresses, (torch.int64,), None)
        tokens = self.addresses.shape[0]
        check_vector("ranks", self.ranks, (torch.int32,), tokens)
        check_vector("firsts", self.firsts, (torch.int32,), tokens)
        check_devices(
            {
                "arena": self.arena,
                "addresses": self.addresses,
                "ranks": self.ranks,
                "firsts": self.firsts,
            }
        )
        if self.columns not in COLUMNS:
            raise ShapeError("columns", f"one of {COLUMNS}", self.columns)
        if self.alignment not in ALIGNMENTS:
            raise ShapeError("alignment", f"one of {ALIGNMENTS}", self.alignment)


@dataclass(frozen=True, slots=True)
class CoreEpilogue:
    """Add ``(h Rᵀ) Bᵀ``, h taken from the GEMM's own output; at most 32 columns.

    The GEMM is widened: behind its ``n`` outputs (modules side by side) lies h in blocks of 16
    columns of the joint basis, block 0 of every module, then block 1 of every module: column j of
    module m at ``h_column + (j // 16)·modules·16 + m·16 + j % 16``.

    Attributes:
        basis: ``(rows.columns or more, n)``, B of the modules side by side, contiguous along n.
        h_column: where h starts in a row.
        matrix: which matrix of a record belongs to the first module; the others follow.
    """

    rows: CoreRows
    basis: Tensor
    h_column: int
    matrix: int


@dataclass(frozen=True, slots=True)
class MixedEpilogue:
    """Add ``u Bᵀ`` where ``u = h Rᵀ`` is already made (``core_project``, ``core_mix``).

    Attributes:
        mixed: ``(splits, tokens, modules, columns)`` float32, summed over the splits; zero for
            tokens without adapter; 16, 32 or 64 columns; a split is contiguous.
        basis: ``(columns or more, n)``, B of the modules side by side, contiguous along n.
    """

    mixed: Tensor
    basis: Tensor


@dataclass(frozen=True, slots=True)
class RowScale:
    """The deferred RMS norm: row t of ``y0 + δ`` is multiplied by ``rsqrt(mean square + eps)``.

    Attributes:
        sums: ``(parts, tokens)`` float32: sums of squares over parts of the row that was
            multiplied with the weight (``add_residual``). Parts may be strided.
        width: how many elements were summed.
        eps: added to the mean square.
    """

    sums: Tensor
    width: int
    eps: float


Epilogue = CoreEpilogue | MixedEpilogue


def check_epilogue(core: Epilogue, argument: str, source: Tensor, widths: Sequence[int]) -> None:
    """Check everything the host can see.

    Args:
        core: the epilogue.
        argument: name of ``source``, for the message.
        source: ``(tokens, …)``, the GEMM's output.
        widths: outputs of each module.

    Raises:
        ShapeError: a shape, dtype, stride or device is wrong (names the argument).
    """
    tokens, n, modules = source.shape[0], sum(widths), len(widths)
    if isinstance(core, CoreEpilogue):
        rows = core.rows
        columns = rows.columns
        if columns not in INLINE_COLUMNS:
            raise ShapeError("columns", f"one of {INLINE_COLUMNS}, or a MixedEpilogue", columns)
        if rows.addresses.shape[0] != tokens:
            raise ShapeError("addresses", f"shape ({tokens},)", tuple(rows.addresses.shape))
        if core.h_column < n:
            raise ShapeError("h_column", f"at least {n}, after the outputs", core.h_column)
        end = core.h_column + modules * columns
        if source.shape[1] < end:
            raise ShapeError(argument, f"at least {end} columns, h included", tuple(source.shape))
        if core.matrix < 0:
            raise ShapeError("matrix", "at least 0", core.matrix)
        if rows.arena.device != source.device:
            raise ShapeError("arena", f"the device of {argument}", rows.arena.device)
    else:
        mixed = core.mixed
        if mixed.dim() != 4 or mixed.shape[1:3] != (tokens, modules):
            rule = f"shape (splits, {tokens}, {modules}, columns)"
            raise ShapeError("mixed", rule, tuple(mixed.shape))
        columns = mixed.shape[3]
        if columns not in COLUMNS:
            raise ShapeError("mixed", f"columns one of {COLUMNS}", columns)
        if mixed.dtype != torch.float32:
            raise ShapeError("mixed", "float32", mixed.dtype)
        if tokens and mixed.stride()[1:] != (modules * columns, columns, 1):
            raise ShapeError("mixed", "contiguous splits", f"strides {mixed.stride()}")
        if mixed.device != source.device:
            raise ShapeError("mixed", f"the device of {argument}", mixed.device)
    basis = core.basis
    if basis.dim() != 2 or basis.shape[0] < columns or basis.shape[1] != n:
        raise ShapeError("basis", f"shape ({columns} or more, {n})", tuple(basis.shape))
    if basis.dtype not in FLOATS:
        raise ShapeError("basis", f"a dtype of {FLOATS}", basis.dtype)
    if n > 1 and basis.stride(1) != 1:
        raise ShapeError("basis", "contiguous along the outputs", f"strides {basis.stride()}")
    if basis.device != source.device:
        raise ShapeError("basis", f"the device of {argument}", basis.device)


def check_scale(scale: RowScale, argument: str, source: Tensor) -> None:
    """Check a ``RowScale`` for the rows of ``source``, which ``argument`` names.

    Raises:
        ShapeError: a shape, dtype, stride or device is wrong (names the argument).
    """
    sums, tokens = scale.sums, source.shape[0]
    if sums.dim() != 2 or sums.shape[1] != tokens or not 1 <= sums.shape[0] <= MAX_PARTS:
        raise ShapeError("sums", f"shape (1 to {MAX_PARTS}, {tokens})", tuple(sums.shape))
    if sums.dtype != torch.float32:
        raise ShapeError("sums", "float32", sums.dtype)
    if tokens > 1 and sums.stride(1) != 1:
        raise ShapeError("sums", "contiguous parts", f"strides {sums.stride()}")
    if sums.device != source.device:
        raise ShapeError("sums", f"the device of {argument}", sums.device)
    if scale.width < 1:
        raise ShapeError("width", "at least 1", scale.width)


def unchunk(h: Tensor, modules: int, columns: int) -> Tensor:
    """h from its chunks: ``(tokens, modules·columns)`` -> ``(tokens, modules, columns)``."""
    blocks = h.reshape(h.shape[0], columns // CHUNK, modules, CHUNK)
    return blocks.transpose(1, 2).reshape(h.shape[0], modules, columns)


def mix_reference(h: Tensor, rows: CoreRows, matrix: int) -> Tensor:
    """``u = h Rᵀ`` float32 of ``h (tokens, modules, columns)``, in the same shape; any device.

    Zero outside the columns of a token's adapter, and for tokens without one. Vectorised over
    tokens, modules and adapters; loops over the distinct pairs of rank and first column.
    """
    modules = h.shape[1]
    mixed = h.new_zeros(h.shape, dtype=torch.float32)
    used = (rows.addresses >= 0).nonzero().squeeze(1)
    kinds = torch.stack((rows.ranks, rows.firsts), dim=1)[used]
    for rank, first in sorted({(r, f) for r, f in kinds.tolist()}):
        same = used[(kinds[:, 0] == rank) & (kinds[:, 1] == first)]
        size = modules * rank * rank
        starts = rows.addresses[same] + matrix * rank * rank
        # Every element starts a row of this overlapping view: the gather needs no arithmetic.
        records = rows.arena.as_strided((rows.arena.numel() - size + 1, size), (1, 1))
        r = records.index_select(0, starts).view(-1, modules, rank, rank).float()
        mine = h[same, :, first : first + rank].float()
        mixed[same, :, first : first + rank] = torch.einsum("tmij,tmj->tmi", r, mine)
    return mixed


def epilogue_reference(y: Tensor, source: Tensor, core: Epilogue, widths: Sequence[int]) -> None:
    """Add the deltas of every module to ``y (tokens, sum(widths))`` float32; any device."""
    modules = len(widths)
    if isinstance(core, CoreEpilogue):
        columns = core.rows.columns
        h = source[:, core.h_column :][:, : modules * columns]
        mixed = mix_reference(unchunk(h, modules, columns), core.rows, core.matrix)
    else:
        mixed = core.mixed.sum(dim=0)
    start = 0
    for module, width in enumerate(widths):
        outputs = slice(start, start + width)
        basis = core.basis[: mixed.shape[2], outputs].float()
        y[:, outputs].addmm_(mixed[:, module], basis)
        start += width


def scale_reference(y: Tensor, scale: RowScale) -> Tensor:
    """``y`` with every row multiplied by its factor; float32, any device."""
    return y * torch.rsqrt(scale.sums.sum(dim=0) / scale.width + scale.eps)[:, None]


def rows_arguments(rows: CoreRows) -> dict[str, object]:
    """The kernel arguments that say which adapter each token has, by name."""
    return {
        "arena_ptr": rows.arena,
        "addresses_ptr": rows.addresses,
        "ranks_ptr": rows.ranks,
        "firsts_ptr": rows.firsts,
        "RANK": rows.columns,
        "ALIGN": rows.alignment,
    }


_WITHOUT_ROWS = dict.fromkeys(("arena_ptr", "addresses_ptr", "ranks_ptr", "firsts_ptr"))
_WITHOUT_MIXED = {"mixed_ptr": None, "mixed_stride": 0, "SPLITS": 1}
_WITHOUT_CORE: dict[str, object] = {
    **_WITHOUT_ROWS,
    **_WITHOUT_MIXED,
    "basis_ptr": None,
    "h_column": 0,
    "matrix": 0,
    "basis_stride": 0,
    "RANK": 16,
    "ALIGN": 1,
    "FLOAT32_DOT": False,
}
_WITHOUT_SCALE: dict[str, object] = {
    "sums_ptr": None, "sums_stride": 0, "parts": 0, "sums_width": 1.0, "sums_eps": 0.0, "PARTS": 1,
}  # fmt: skip


def epilogue_arguments(core: Epilogue | None) -> dict[str, object]:
    """The arguments every fused kernel takes, by name; without ``core`` they compile to nothing."""
    if core is None:
        return _WITHOUT_CORE
    basis = core.basis
    shared = {
        "basis_ptr": basis,
        "basis_stride": basis.stride(0),
        "FLOAT32_DOT": dot_in_float32(basis.dtype),
    }
    if isinstance(core, CoreEpilogue):
        place = {"h_column": core.h_column, "matrix": core.matrix}
        return {**rows_arguments(core.rows), **_WITHOUT_MIXED, **place, **shared}
    mixed = core.mixed
    return {
        **_WITHOUT_ROWS,
        "mixed_ptr": mixed,
        "mixed_stride": mixed.stride(0),
        "SPLITS": mixed.shape[0],
        "h_column": 0,
        "matrix": 0,
        "RANK": mixed.shape[3],
        "ALIGN": 1,
        **shared,
    }


def scale_arguments(scale: RowScale | None) -> dict[str, object]:
    """The arguments of kernels that take a ``RowScale``, by name."""
    if scale is None:
        return _WITHOUT_SCALE
    parts = scale.sums.shape[0]
    return {
        "sums_ptr": scale.sums,
        "sums_stride": scale.sums.stride(0),
        "parts": parts,
        "sums_width": float(scale.width),
        "sums_eps": scale.eps,
        "PARTS": power_of_two(parts),
    }


def default_tile(core: Epilogue, tokens: int) -> TileConfig:
    """The launch parameters of a fused kernel with adapters, where it has none of its own."""
    if isinstance(core, CoreEpilogue):
        return TileConfig(16, 256, 4 if core.rows.columns == 16 else 8)
    warps = 4 if core.mixed.shape[3] == 16 else 8
    # Swept in prompt steps of 8192 tokens (H100, Llama-3.1-8B, rank 16).
    return TileConfig(32, 128, warps) if tokens > PROMPT_TOKENS else TileConfig(16, 256, warps)
