"""What the families do with a step's device tables, through ``shoal.kernels``.

Every part reads who uses what from tensors whose place never changes, and launches grids that do
not depend on what is in them: so a captured step can be replayed once the tables are filled anew.
Adapters on the joint basis are no part here; the kernels behind the GEMMs apply them. On CPU
tensors the kernels run their torch references.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from shoal.adapters.families import fold, lora, scale
from shoal.adapters.families.core import CoreBasis
from shoal.adapters.families.spectral import SpectralPart
from shoal.adapters.spec import GROUPS, MODULES, BaseShape, Group
from shoal.kernels.core_apply.kernel import core_apply
from shoal.kernels.fold_sum.kernel import fold_sum
from shoal.kernels.grouped_matmul.kernel import TileTable, expand, shrink
from shoal.kernels.scale_outputs.kernel import scale_outputs

# Divides every record's start (a unit's); no load is wider than 16 elements.
ALIGNMENT = 16


class TablePart(Protocol):
    """The tokens of a step that one family treats alike: something before the GEMM, the rest after.

    What needs the GEMM's input alone comes before it, so that what comes behind it can begin to
    read the adapters while the GEMM still runs (``early``, see ``launching.overlap_options``).
    """

    def before(self, layer: int, group: Group, x: Tensor) -> Tensor | None:
        """What ``apply`` needs of ``x (tokens, d_in)``, the GEMM's input."""
        ...

    def apply(
        self, layer: int, group: Group, made: Tensor | None, y: Tensor, *, early: bool
    ) -> None:
        """Add the deltas to ``y (tokens, n_group)``; ``made``: what ``before`` returned."""
        ...


class TablesScale:
    """All tokens of a step whose adapters have row scales."""

    def __init__(self, addresses: Tensor, shape: BaseShape, arena: Tensor) -> None:
        """``addresses``: ``(tokens,)`` int64, where a token's section starts; -1 elsewhere."""
        self._addresses = addresses
        self._arena = arena
        self._offsets = {
            (layer, group): scale.record_offset(shape, layer, group)
            for layer in range(shape.num_layers)
            for group in GROUPS
        }
        self._alignment = math.gcd(ALIGNMENT, *self._offsets.values())
        # A table that was never filled, in a step that is run to compile, holds zeros: a section at
        # the arena's start. It must lie inside; where it does not, no such adapter is resident.
        self._fits = scale.packed_elements(shape) <= arena.numel()

    def before(self, layer: int, group: Group, x: Tensor) -> None:
        """Nothing."""

    def apply(
        self, layer: int, group: Group, made: Tensor | None, y: Tensor, *, early: bool
    ) -> None:
        """Scale these tokens' rows of ``y``, which hold ``y0``."""
        if not self._fits:
            return
        scale_outputs(
            y,
            self._arena,
            self._addresses,
            offset=self._offsets[layer, group],
            alignment=self._alignment,
        )


class TablesFold:
    """All tokens of a step whose adapters are ``fold``."""

    def __init__(
        self, ranks: Tensor, tiles: TileTable, columns: int, shape: BaseShape, arena: Tensor
    ) -> None:
        """``ranks``: ``(tokens,)`` int32, 0 elsewhere; ``columns``: at least the largest rank."""
        self._ranks = ranks
        self._tiles = tiles
        self._columns = columns
        self._shape = shape
        self._arena = arena
        # A record is linear in its rank, so the offsets at rank 1 are the scales.
        self._scales = {
            (layer, group): fold.record_offset(shape, 1, layer, group)
            for layer in range(shape.num_layers)
            for group in GROUPS
        }
        self._alignment = math.gcd(ALIGNMENT, *self._scales.values())

    def before(self, layer: int, group: Group, x: Tensor) -> Tensor:
        """``S_r(x)`` of every token, in its first columns."""
        return fold_sum(x, self._ranks, self._columns)

    def apply(
        self, layer: int, group: Group, made: Tensor | None, y: Tensor, *, early: bool
    ) -> None:
        """Add the deltas to ``y``."""
        assert made is not None
        expand(
            made,
            self._arena,
            self._tiles,
            y,
            widths=(self._shape.group_dims(group).d_out,),
            scale=self._scales[layer, group],
            alignment=self._alignment,
            early=early,
        )


class TablesLora:
    """All tokens of a step whose adapters are ``lora``."""

    def __init__(self, tiles: TileTable, columns: int, shape: BaseShape, arena: Tensor) -> None:
        """``columns``: at least the largest rank."""
        self._tiles = tiles
        self._columns = columns
        self._arena = arena
        self._widths = {
            group: tuple(shape.dims[module].d_out for module in modules)
            for group, modules in GROUPS.items()
        }
        self._a_scales: dict[tuple[int, Group], int] = {}
        self._b_scales: dict[tuple[int, Group], int] = {}
        for layer in range(shape.num_layers):
            for group, modules in GROUPS.items():
                offset = lora.record_offset(shape, 1, layer, group)
                self._a_scales[layer, group] = offset
                self._b_scales[layer, group] = offset + len(modules) * shape.group_dims(group).d_in
        scales = (*self._a_scales.values(), *self._b_scales.values())
        self._alignment = math.gcd(ALIGNMENT, *scales)

    def before(self, layer: int, group: Group, x: Tensor) -> Tensor:
        """``x Aᵀ`` of every token, for all modules of the group in one launch."""
        modules = len(self._widths[group])
        columns = modules * self._columns
        shrunk = torch.empty((x.shape[0], columns), dtype=torch.float32, device=x.device)
        shrink(
            x,
            self._arena,
            self._tiles,
            shrunk,
            modules=modules,
            scale=self._a_scales[layer, group],
            alignment=self._alignment,
        )
        return shrunk

    def apply(
        self, layer: int, group: Group, made: Tensor | None, y: Tensor, *, early: bool
    ) -> None:
        """Add the deltas to ``y``, for all modules of the group in one launch."""
        assert made is not None
        expand(
            made,
            self._arena,
            self._tiles,
            y,
            widths=self._widths[group],
            scale=self._b_scales[layer, group],
            alignment=self._alignment,
            early=early,
        )


class TablesCore:
    """All tokens of a step that are ``core`` on one basis without columns of the joint one.

    The slow way: a GEMM of its own for ``h`` and two to three launches, for every module.
    """

    def __init__(
        self,
        addresses: Tensor,
        squares: Tensor,
        ranks: Tensor,
        basis: CoreBasis,
        max_rank: int,
        alignment: int,
        shape: BaseShape,
        arena: Tensor,
    ) -> None:
        """Tables of ``(tokens,)``.

        Args:
            addresses: int64, where a token's record starts, -1 where it has none.
            squares: int64, elements of one matrix, 0 where it has none.
            ranks: int32, at most ``max_rank``.
        """
        self._addresses = addresses
        self._squares = squares
        self._ranks = ranks
        self._basis = basis
        self._max_rank = min(max_rank, basis.rank)
        self._alignment = alignment
        self._shape = shape
        self._arena = arena

    def before(self, layer: int, group: Group, x: Tensor) -> None:
        """Nothing: ``h`` is made of the GEMM's output."""

    def apply(
        self, layer: int, group: Group, made: Tensor | None, y: Tensor, *, early: bool
    ) -> None:
        """Add the deltas to ``y``, which holds ``y0`` in these tokens' rows."""
        start = 0
        for module in GROUPS[group]:
            width = self._shape.dims[module].d_out
            outputs = y.narrow(1, start, width)
            start += width
            rows = self._basis.rows(layer, module, self._max_rank)
            if rows is None:
                continue
            matrix = layer * len(MODULES) + MODULES.index(module)
            basis = rows.T
            if basis.stride(1) != 1:  # on a CPU, whose bases lie the other way
                basis = basis.contiguous()
            core_apply(
                outputs,
                outputs.to(rows.dtype) @ rows.T,
                self._arena,
                # Stays -1 where it is -1.
                torch.add(self._addresses, self._squares, alpha=matrix),
                self._ranks,
                basis,
                max_rank=self._max_rank,
                alignment=self._alignment,
            )


class TablesSpectral:
    """The spectral tokens of one step: in torch, and valid for that step alone."""

    def __init__(self, part: SpectralPart) -> None:
        self._part = part

    def before(self, layer: int, group: Group, x: Tensor) -> Tensor:
        """x itself."""
        return x

    def apply(
        self, layer: int, group: Group, made: Tensor | None, y: Tensor, *, early: bool
    ) -> None:
        """Add the deltas to ``y``."""
        assert made is not None
        self._part.apply(layer, group, made, y)
