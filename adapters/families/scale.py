"""``scale``: a factor per output (DoRA), ``y = g ⊙ y0``, before the low-rank delta is added.

A section holds ``[layer][group][n_group]`` of ``g - 1``, the outputs of a group's modules side by
side, zero where a target has no factors: near 1 a 16-bit ``g`` would keep three digits of what the
adapter has learnt. The same ``g`` on the low-rank delta is folded into its ``B`` (``lora.py``).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shoal.adapters.families import fold
from shoal.adapters.families.tiles import Records, Segment, Tiling, Tokens, apply_tiles
from shoal.adapters.spec import GROUPS, BaseShape, Group, Target
from shoal.adapters.weights import AdapterWeights, Terms


def packed_elements(shape: BaseShape) -> int:
    """Elements of one section."""
    return fold.packed_elements(shape, 1)


def record_offset(shape: BaseShape, layer: int, group: Group) -> int:
    """Where the factors of one layer and group start inside a section, in elements."""
    return fold.record_offset(shape, 1, layer, group)


def pack(terms: Terms, shape: BaseShape, out: Tensor) -> None:
    """Fill ``out`` (1-D, ``packed_elements`` long, the bank's dtype) with a sum's row scales.

    What they add to ``y0`` is linear in ``g - 1``, so that is what is summed.
    """
    out.zero_()
    for layer in range(shape.num_layers):
        for group, modules in GROUPS.items():
            start = record_offset(shape, layer, group)
            for module in modules:
                width = shape.dims[module].d_out
                total = torch.zeros(width, dtype=torch.float64)
                for weights, factor in terms:
                    g = weights.row_scales.get(Target(layer, module))
                    if g is not None:
                        total += factor * (g.to(torch.float64) - 1.0)
                out.narrow(0, start, width).copy_(total)
                start += width


def reference(
    weights: AdapterWeights,
    shape: BaseShape,
    layer: int,
    group: Group,
    x: Tensor,
    y0: Tensor,
    factors: Mapping[Target, Tensor],
) -> Tensor:
    """What the row scales add to ``y0 (tokens, n_group)``: ``(g - 1) ⊙ y0``, in its dtype."""
    delta = torch.zeros_like(y0)
    start = 0
    for module in GROUPS[group]:
        columns = slice(start, start + shape.dims[module].d_out)
        start = columns.stop
        g = weights.row_scales.get(Target(layer, module))
        if g is not None:
            delta[:, columns] = (g.to(y0.dtype) - 1.0) * y0[:, columns]
    return delta


class ScalePart:
    """The tokens of a step whose adapters have row scales."""

    def __init__(self, segments: Sequence[Segment], shape: BaseShape, records: Records) -> None:
        self.shape = shape
        self.records = records
        self.tokens = Tokens.of(segments, records.arena.device)
        self.tiling = Tiling.of(segments, records.arena.device)

    def apply(self, layer: int, group: Group, x: Tensor, y: Tensor) -> None:
        """Scale these tokens' rows of ``y``, which hold ``y0``."""
        scaled = apply_tiles(
            self.tiling,
            self.records,
            self.tokens.take(y).float(),
            record_offset(self.shape, layer, group),
            self.shape.group_dims(group).d_out,
            lambda tokens, data: tokens * (data.float() + 1.0)[:, None],
        )
        self.tokens.write(y, scaled)
