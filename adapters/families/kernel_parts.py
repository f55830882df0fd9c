"""The parts of a step through ``shoal.kernels``: what CUDA runs when Triton is installed.

Same records and same results as the torch parts beside each family. What differs: a token's record
is named by its address in the arena instead of being gathered, and the addresses for every layer
are worked out once per step. On CPU tensors the kernels run their torch references.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shoal.adapters.families import fold, lora
from shoal.adapters.families.core import CoreBasis
from shoal.adapters.families.tiles import Records, Segment, index_tensor
from shoal.adapters.spec import GROUPS, MODULES, BaseShape, Group
from shoal.kernels.core_apply.kernel import core_apply
from shoal.kernels.fold_sum.kernel import fold_sum
from shoal.kernels.grouped_matmul.kernel import Tiles, grouped_matmul, upload_tiles
from shoal.kernels.grouped_matmul.tiles import make_tiles

# Divides every unit's first element; no load is wider than 16 elements.
ALIGNMENT = 16


class _Span:
    """The range of tokens from the first to the last of some segments, and what each one uses."""

    def __init__(self, segments: Sequence[Segment], records: Records) -> None:
        self.arena = records.arena
        self.segments = sorted(segments, key=lambda segment: segment.start)
        self.start = self.segments[0].start
        self.count = self.segments[-1].start + self.segments[-1].length - self.start
        self.unit_elements = records.unit_elements

    def take(self, tensor: Tensor) -> Tensor:
        return tensor.narrow(0, self.start, self.count)

    def addresses(self, inside: Tensor) -> tuple[Tensor, ...]:
        """Each token's address, for every offset inside a record; -1 between the segments.

        Args:
            inside: ``(offsets, 1)`` int64, or ``(offsets, count)`` where it depends on the token.

        Returns:
            One ``(count,)`` int64 per offset.
        """
        bases = [-1] * self.count
        for unit, start, length in self.segments:
            first = start - self.start
            bases[first : first + length] = [unit * self.unit_elements] * length
        base = index_tensor(bases, self.arena.device)
        return torch.where(base < 0, base, base + inside).unbind(0)

    def tiles(self) -> Tiles:
        """Neighbouring tokens of one record, to read it once."""
        runs: list[tuple[int, int]] = []
        position = self.start
        for unit, start, length in self.segments:
            runs += [(-1, start - position), (unit, length)]
            position = start + length
        return upload_tiles(make_tiles(runs), self.arena.device)


class KernelCorePart:
    """The tokens of a step that are ``core`` on one basis, whatever their ranks."""

    def __init__(
        self,
        segments: Mapping[int, Sequence[Segment]],
        basis: CoreBasis,
        shape: BaseShape,
        records: Records,
    ) -> None:
        """``segments``: by rank, at most ``core_apply``'s ``MAX_RANK``."""
        self.shape = shape
        self.basis = basis
        self.max_rank = max(segments)
        assert self.max_rank <= basis.rank
        self.alignment = math.gcd(ALIGNMENT, *segments)
        self.span = _Span([segment for own in segments.values() for segment in own], records)
        device = records.arena.device
        by_token = [1] * self.span.count
        for rank, own in segments.items():
            for _, start, length in own:
                first = start - self.span.start
                by_token[first : first + length] = [rank] * length
        ranks = index_tensor(by_token, device)
        targets = torch.arange(shape.num_layers * len(MODULES), device=device)
        self.addresses = self.span.addresses(targets[:, None] * ranks.square())
        self.ranks = ranks.int()

    def apply(self, layer: int, group: Group, x: Tensor, y: Tensor) -> None:
        """Add the deltas to ``y``, which holds ``y0``."""
        part = self.span.take(y)
        start = 0
        for module in GROUPS[group]:
            width = self.shape.dims[module].d_out
            columns = part.narrow(1, start, width)
            start += width
            rows = self.basis.rows(layer, module, self.max_rank)
            if rows is None:
                continue
            core_apply(
                columns,
                columns.to(rows.dtype) @ rows.T,
                self.span.arena,
                self.addresses[layer * len(MODULES) + MODULES.index(module)],
                self.ranks,
                rows.T,
                max_rank=self.max_rank,
                alignment=self.alignment,
            )


class KernelFoldPart:
    """The tokens of a step that are ``fold`` of one rank."""

    def __init__(
        self, segments: Sequence[Segment], rank: int, shape: BaseShape, records: Records
    ) -> None:
        self.shape = shape
        self.rank = rank
        self.span = _Span(segments, records)
        self.tiles = self.span.tiles()
        offsets = {
            (layer, group): fold.record_offset(shape, rank, layer, group)
            for layer in range(shape.num_layers)
            for group in GROUPS
        }
        self.alignment = math.gcd(ALIGNMENT, *offsets.values())
        inside = index_tensor(list(offsets.values()), records.arena.device)[:, None]
        self.addresses = dict(zip(offsets, self.span.addresses(inside), strict=True))

    def apply(self, layer: int, group: Group, x: Tensor, y: Tensor) -> None:
        """Add the deltas to ``y``."""
        grouped_matmul(
            fold_sum(self.span.take(x), self.rank),
            self.span.arena,
            self.addresses[layer, group],
            self.span.take(y),
            row_stride=self.shape.group_dims(group).d_out,
            tiles=self.tiles,
            alignment=self.alignment,
        )


class KernelLoraPart:
    """The tokens of a step that are ``lora`` of one rank."""

    def __init__(
        self, segments: Sequence[Segment], rank: int, shape: BaseShape, records: Records
    ) -> None:
        self.shape = shape
        self.rank = rank
        self.span = _Span(segments, records)
        self.tiles = self.span.tiles()
        # Per layer and group: where A starts, and per module where its columns of Bt start.
        offsets: dict[tuple[int, str], int] = {}
        for layer in range(shape.num_layers):
            for group, modules in GROUPS.items():
                offset = lora.record_offset(shape, rank, layer, group)
                offsets[layer, group] = offset
                offset += len(modules) * rank * shape.group_dims(group).d_in
                for module in modules:
                    offsets[layer, module] = offset
                    offset += shape.dims[module].d_out
        self.alignment = math.gcd(ALIGNMENT, *offsets.values())
        inside = index_tensor(list(offsets.values()), records.arena.device)[:, None]
        self.addresses = dict(zip(offsets, self.span.addresses(inside), strict=True))

    def apply(self, layer: int, group: Group, x: Tensor, y: Tensor) -> None:
        """Add the deltas to ``y``: one shrink for the group, one expand per module."""
        dims = self.shape.group_dims(group)
        rank = self.rank
        part = self.span.take(y)
        shrunk = x.new_zeros(self.span.count, len(GROUPS[group]) * rank, dtype=torch.float32)
        grouped_matmul(
            self.span.take(x),
            self.span.arena,
            self.addresses[layer, group],
            shrunk,
            row_stride=dims.d_in,
            transposed=True,
            tiles=self.tiles,
            alignment=self.alignment,
        )
        start = 0
        for i, module in enumerate(GROUPS[group]):
            width = self.shape.dims[module].d_out
            grouped_matmul(
                shrunk.narrow(1, i * rank, rank),
                self.span.arena,
                self.addresses[layer, module],
                part.narrow(1, start, width),
                row_stride=dims.d_out,
                tiles=self.tiles,
                alignment=self.alignment,
            )
            start += width
