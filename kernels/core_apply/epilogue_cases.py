"""Adapters for the cases of kernels with an ``Epilogue``. Owns no outputs: those are theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.core_apply.epilogue import (
    CHUNK,
    CoreEpilogue,
    CoreRows,
    Epilogue,
    MixedEpilogue,
    RowScale,
)
from shoal.kernels.testing import poisoned_arena, poisoned_rows, random


@dataclass(frozen=True, slots=True)
class CoreCase:
    """The adapters of a case.

    Attributes:
        columns: of the joint basis, 16, 32 or 64.
        ranks: adapter ``a`` has ``ranks[a % len(ranks)]``.
        firsts: where adapter ``a``'s columns start, ``firsts[a % len(firsts)]``.
        adapters: how many distinct adapters; token ``t`` uses ``t % adapters``.
        bare_every: every so many tokens one has no adapter (0: all have one).
        gap: columns between the outputs and h.
        splits: 0: a ``CoreEpilogue``; else a ``MixedEpilogue`` of so many.
    """

    columns: int
    ranks: tuple[int, ...]
    adapters: int
    firsts: tuple[int, ...] = (0,)
    bare_every: int = 0
    gap: int = 0
    matrix: int = 0
    alignment: int = 1
    splits: int = 0


MIXED_RANKS = CoreCase(
    columns=32,
    ranks=(1, 29, 7, 16),
    firsts=(0, 3, 25, 16),
    adapters=9,
    bare_every=5,
    gap=3,
    matrix=2,
)
ALIGNED = CoreCase(
    columns=32, ranks=(8, 16, 16), firsts=(0, 16, 8), adapters=7, bare_every=4, alignment=8
)
SMALL = CoreCase(columns=16, ranks=(4,), adapters=1)
BARE = CoreCase(columns=16, ranks=(8,), adapters=1, bare_every=1)
MADE = CoreCase(
    columns=64, ranks=(1, 64, 7), firsts=(63, 0, 20), adapters=5, bare_every=4, splits=3
)
LARGEST = CoreCase(columns=32, ranks=(16, 32, 7), firsts=(16, 0, 3), adapters=300, bare_every=9)


def chunked(h: Tensor) -> Tensor:
    """h ``(tokens, modules, columns)`` in the order of a widened GEMM's output."""
    tokens, modules, columns = h.shape
    blocks = h.view(tokens, modules, columns // CHUNK, CHUNK)
    return blocks.transpose(1, 2).reshape(tokens, modules * columns)


def make_rows(
    case: CoreCase,
    tokens: int,
    modules: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> tuple[CoreRows, Tensor]:
    """The case's adapters, with NaN around the used matrices of their records.

    Returns:
        The rows, and which of the columns each token uses, ``(tokens, columns)`` on the CPU.
    """
    ranks = [case.ranks[a % len(case.ranks)] for a in range(case.adapters)]
    firsts = [case.firsts[a % len(case.firsts)] for a in range(case.adapters)]
    records = []
    for rank in ranks:
        before = torch.full((case.matrix, rank, rank), float("nan"), dtype=dtype)
        used = random((modules, rank, rank), generator, dtype, rank**-0.5)
        records.append(torch.cat((before, used)))
    arena, starts = poisoned_arena(records)
    owner = torch.arange(tokens) % case.adapters
    bare = torch.arange(tokens) % max(1, case.bare_every) == 0
    bare = bare if case.bare_every else torch.zeros_like(bare)
    address = torch.tensor(starts)[owner].masked_fill(bare, -1)
    rank_of = torch.tensor(ranks, dtype=torch.int32)[owner]
    first_of = torch.tensor(firsts, dtype=torch.int32)[owner]
    column = torch.arange(case.columns)
    inside = (column >= first_of[:, None]) & (column < (first_of + rank_of)[:, None])
    rows = CoreRows(
        arena.to(device),
        address.to(device),
        rank_of.to(device),
        first_of.to(device),
        case.columns,
        case.alignment,
    )
    return rows, inside & ~bare[:, None]


def widen(
    y0: Tensor, case: CoreCase | None, widths: Sequence[int], generator: torch.Generator
) -> tuple[Tensor, Epilogue | None]:
    """A strided row ``[y0, gap, h…, margin]`` as the widened GEMM leaves it, and its adapters.

    NaN fills the arena around the used matrices, the gap, the margins, the columns of h that a
    token does not use, and the rows of the basis beyond the step's columns. Deltas have magnitude
    about one. Everything is on y0's device.
    """
    if case is None:
        return poisoned_rows(y0), None
    tokens, dtype, device = y0.shape[0], y0.dtype, y0.device
    modules = len(widths)
    rows, used = make_rows(case, tokens, modules, dtype, device, generator)
    basis = random((case.columns, sum(widths)), generator, dtype, case.columns**-0.5)
    basis = torch.cat((basis, torch.full((16, sum(widths)), float("nan"), dtype=dtype)))
    basis = poisoned_rows(basis.to(device))
    if case.splits:
        size = (case.splits, tokens, modules, case.columns)
        mixed = random(size, generator, torch.float32, case.splits**-0.5)
        mixed = mixed.masked_fill(~used[:, None], 0.0).to(device)
        return poisoned_rows(y0), MixedEpilogue(mixed, basis)
    h = random((tokens, modules, case.columns), generator, dtype)
    h = chunked(h.masked_fill(~used[:, None], float("nan")))
    gap = torch.full((tokens, case.gap), float("nan"), dtype=dtype)
    row = torch.cat((y0.cpu(), gap, h), dim=1).to(device)
    return poisoned_rows(row), CoreEpilogue(rows, basis, y0.shape[1] + case.gap, case.matrix)


def defined_mix(h: Tensor, rows: CoreRows, matrix: int) -> Tensor:
    """``u = h Rᵀ`` of ``h (tokens, modules, columns)``: the definition, token by token, float64."""
    mixed = torch.zeros(h.shape, dtype=torch.float64, device=h.device)
    for t, address in enumerate(rows.addresses.tolist()):
        rank, first = int(rows.ranks[t]), int(rows.firsts[t])
        for module in range(h.shape[1] if address >= 0 else 0):
            start = address + (matrix + module) * rank * rank
            r = rows.arena[start : start + rank * rank].double().view(rank, rank)
            used = slice(first, first + rank)
            mixed[t, module, used] = r @ h[t, module, used].double()
    return mixed


def defined_deltas(source: Tensor, core: Epilogue, widths: Sequence[int]) -> Tensor:
    """What ``core`` adds to the outputs: the definition in float64, ``(tokens, sum(widths))``."""
    if isinstance(core, MixedEpilogue):
        mixed = core.mixed.double().sum(dim=0)
    else:
        modules, columns = len(widths), core.rows.columns
        h = source.new_empty((source.shape[0], modules, columns))
        for module in range(modules):
            for j in range(columns):
                at = core.h_column + j // CHUNK * modules * CHUNK + module * CHUNK + j % CHUNK
                h[:, module, j] = source[:, at]
        mixed = defined_mix(h, core.rows, core.matrix)
    bases = torch.split(core.basis[: mixed.shape[2]].double(), list(widths), dim=1)
    return torch.cat([mixed[:, m] @ basis for m, basis in enumerate(bases)], dim=1)


def make_scale(
    parts: int, tokens: int, device: torch.device, generator: torch.Generator
) -> RowScale | None:
    """Row factors of about one half to two, from strided ``parts``; None for none."""
    if not parts:
        return None
    width = 64
    spread = torch.rand((parts, tokens), generator=generator) * 3 + 0.25
    return RowScale(poisoned_rows((spread * width / parts).to(device)), width, 1e-5)
