"""``CoreEpilogue``: LoRA-XS for kernels that apply it themselves, while they read a GEMM's output.

Owns the arguments those kernels share, their checks and what they mean in plain torch. The device
code is in ``jit.py``; a step whose ranks exceed ``MAX_FUSED_RANK`` takes ``core_apply`` instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.core_apply.reference import core_apply_reference
from shoal.kernels.errors import ShapeError, check_devices, check_vector
from shoal.kernels.launching import ALIGNMENTS, FLOATS, dot_in_float32, power_of_two

MAX_FUSED_RANK = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreEpilogue:
    """What ``y += (h Rᵀ) Bᵀ`` needs, for the modules whose outputs lie side by side in one GEMM.

    The GEMM is widened: its rows hold y0 of every module, and from column ``h_column`` on
    ``h = y0 B`` of every module, ``columns`` of them each, in the same order.

    Attributes:
        arena: ``(elements,)``, all adapters; the scale is folded into R.
        addresses: ``(tokens,)`` int64, where each token's record starts in the arena; -1: none.
        ranks: ``(tokens,)`` int32, r of the record, at most ``columns``; ignored without adapter.
        basis: ``(n, columns)``, B of the modules one below the other in the order of the outputs.
            Either axis may be the contiguous one; for ``add_rms_norm`` it should be the first.
        h_column: where h of the first module starts in a row.
        matrix: which ``(r, r)`` of a record belongs to the first module; the others follow. So
            addresses serve every layer, and a layer is a number in its launch.
        firsts: ``(tokens,)`` int32 or None (0). Bases may share the columns, each in a run of
            them: the token's basis starts at this column (of h too).
        alignment: divides every used address and rank, and first (1, 2, 4, 8 or 16). A promise.
    """

    arena: Tensor
    addresses: Tensor
    ranks: Tensor
    basis: Tensor
    h_column: int
    matrix: int = 0
    firsts: Tensor | None = None
    alignment: int = 1


def check_epilogue(
    core: CoreEpilogue, argument: str, source: Tensor, widths: Sequence[int]
) -> None:
    """Check everything the host can see.

    Args:
        core: the epilogue.
        argument: name of ``source``, for the message.
        source: ``(tokens, …)``, the widened GEMM's output.
        widths: outputs of each module.

    Raises:
        ShapeError: a shape, dtype, stride or device is wrong (names the argument).
    """
    tokens, basis = source.shape[0], core.basis
    if basis.dim() != 2 or basis.shape[0] != sum(widths):
        raise ShapeError("basis", f"shape ({sum(widths)}, columns)", tuple(basis.shape))
    if basis.dtype not in FLOATS:
        raise ShapeError("basis", f"a dtype of {FLOATS}", basis.dtype)
    if basis.numel() > 1 and 1 not in basis.stride():
        raise ShapeError("basis", "one contiguous axis", f"strides {basis.stride()}")
    columns = basis.shape[1]
    if not 1 <= columns <= MAX_FUSED_RANK:
        raise ShapeError("basis", f"1 to {MAX_FUSED_RANK} columns", columns)
    if core.h_column < sum(widths):
        raise ShapeError("h_column", f"at least {sum(widths)}, after the outputs", core.h_column)
    end = core.h_column + len(widths) * columns
    if source.shape[1] < end:
        raise ShapeError(argument, f"at least {end} columns, h included", tuple(source.shape))
    if core.matrix < 0:
        raise ShapeError("matrix", "at least 0", core.matrix)
    check_vector("arena", core.arena, FLOATS, None)
    check_vector("addresses", core.addresses, (torch.int64,), tokens)
    check_vector("ranks", core.ranks, (torch.int32,), tokens)
    if core.firsts is not None:
        check_vector("firsts", core.firsts, (torch.int32,), tokens)
    check_devices(
        {
            argument: source,
            "arena": core.arena,
            "addresses": core.addresses,
            "ranks": core.ranks,
            "basis": basis,
            "firsts": core.firsts,
        }
    )
    if core.alignment not in ALIGNMENTS:
        raise ShapeError("alignment", f"one of {ALIGNMENTS}", core.alignment)


def epilogue_reference(
    y: Tensor, source: Tensor, core: CoreEpilogue, widths: Sequence[int]
) -> None:
    """Add the deltas of every module to ``y (tokens, sum(widths))`` float32; any device."""
    columns = core.basis.shape[1]
    used = core.addresses >= 0
    firsts = torch.zeros_like(core.ranks) if core.firsts is None else core.firsts
    start = 0
    for module, width in enumerate(widths):
        rows = slice(start, start + width)
        start += width
        h = source[:, core.h_column + module * columns :][:, :columns]
        address = core.addresses + (core.matrix + module) * core.ranks.long().square()
        for first in sorted(set(firsts[used].tolist())):
            core_apply_reference(
                y[:, rows],
                h[:, first:],
                core.arena,
                torch.where(used & (firsts == first), address, -1),
                core.ranks,
                core.basis[rows, first:],
            )


def epilogue_arguments(core: CoreEpilogue | None) -> dict[str, object]:
    """The arguments every fused kernel takes, by name; without ``core`` it compiles to nothing."""
    if core is None:
        pointers = ("arena_ptr", "addresses_ptr", "ranks_ptr", "firsts_ptr", "basis_ptr")
        numbers = ("h_column", "columns", "matrix", "basis_stride", "basis_rank_stride")
        return {
            **dict.fromkeys(pointers),
            **dict.fromkeys(numbers, 0),
            "RANK": 16,
            "ALIGN": 1,
        }
    return {
        "arena_ptr": core.arena,
        "addresses_ptr": core.addresses,
        "ranks_ptr": core.ranks,
        "firsts_ptr": core.firsts,
        "basis_ptr": core.basis,
        "h_column": core.h_column,
        "columns": core.basis.shape[1],
        "matrix": core.matrix,
        "basis_stride": core.basis.stride(0),
        "basis_rank_stride": core.basis.stride(1),
        "RANK": power_of_two(core.basis.shape[1], least=16),  # the least inner size of tl.dot
        "ALIGN": core.alignment,
    }


def epilogue_dot_in_float32(core: CoreEpilogue | None) -> bool:
    """FLOAT32_DOT of the kernels that use ``tl.dot``."""
    return core is not None and dot_in_float32(core.basis.dtype)
