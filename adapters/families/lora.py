"""``lora``: adapters with factors of their own per target, ``delta = s·(x Aᵀ) Bᵀ``.

A record holds ``[layer][group][ A: (m, r, d_in), Bt: (r, n_group) ]`` for the m modules of a group:
the ``A`` of each module one below the other, then ``s·Bᵀ`` of each module side by side; zero where
a target is absent, zero-padded where its own rank is smaller. Row scales (DoRA's ``g``) multiply
the delta as well, ``s·(x Aᵀ) (g ⊙ B)ᵀ``, so they are folded into ``B``; what they do to ``y0`` is
``scale.py``'s.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shoal.adapters.families.tiles import Records, Segment, Tiling, Tokens, apply_tiles
from shoal.adapters.spec import GROUPS, BaseShape, Group, Target
from shoal.adapters.weights import AdapterWeights, Terms


def group_elements(shape: BaseShape, rank: int, group: Group) -> int:
    """Elements of one layer and group inside a record."""
    dims = shape.group_dims(group)
    return rank * (len(GROUPS[group]) * dims.d_in + dims.d_out)


def packed_elements(shape: BaseShape, rank: int) -> int:
    """Elements of one record."""
    return shape.num_layers * sum(group_elements(shape, rank, group) for group in GROUPS)


def record_offset(shape: BaseShape, rank: int, layer: int, group: Group) -> int:
    """Where the ``A`` of one layer and group starts inside a record, in elements."""
    offset = layer * sum(group_elements(shape, rank, g) for g in GROUPS)
    for before in GROUPS:
        if before == group:
            break
        offset += group_elements(shape, rank, before)
    return offset


def packed_rank(terms: Terms) -> int:
    """The rank all targets of a sum are packed at: the largest sum of a target's ranks."""
    ranks: Counter[Target] = Counter()
    for weights, _ in terms:
        ranks.update({target: a.shape[0] for target, (a, _) in weights.tensors.items()})
    return max(ranks.values(), default=0)


def pack(terms: Terms, shape: BaseShape, out: Tensor) -> None:
    """Fill ``out`` (1-D, ``packed_elements`` long, the bank's dtype) with a sum.

    The factors of one term lie behind those of the one before: that adds up their deltas.
    """
    rank = packed_rank(terms)
    out.zero_()
    for layer in range(shape.num_layers):
        for group, modules in GROUPS.items():
            dims = shape.group_dims(group)
            offset = record_offset(shape, rank, layer, group)
            data = out.narrow(0, offset, group_elements(shape, rank, group))
            a_rows = data[: len(modules) * rank * dims.d_in].view(len(modules), rank, dims.d_in)
            bt = data[a_rows.numel() :].view(rank, dims.d_out)
            start = 0
            for i, module in enumerate(modules):
                columns = slice(start, start + shape.dims[module].d_out)
                start = columns.stop
                target = Target(layer, module)
                used = 0
                for weights, factor in terms:
                    if target not in weights.tensors:
                        continue
                    a, b = weights.tensors[target]
                    own = slice(used, used + a.shape[0])
                    used = own.stop
                    a_rows[i, own] = a.to(out.dtype)
                    scaled = b.to(torch.float64) * (weights.scales[target] * factor)
                    if target in weights.row_scales:
                        scaled *= weights.row_scales[target].to(torch.float64)[:, None]
                    bt[own, columns] = scaled.T.to(out.dtype)


def reference(
    weights: AdapterWeights,
    shape: BaseShape,
    layer: int,
    group: Group,
    x: Tensor,
    y0: Tensor,
    factors: Mapping[Target, Tensor],
) -> Tensor:
    """What one adapter adds to ``y0 (tokens, n_group)``, module by module, in ``y0``'s dtype."""
    delta = torch.zeros_like(y0)
    start = 0
    for module in GROUPS[group]:
        columns = slice(start, start + shape.dims[module].d_out)
        start = columns.stop
        target = Target(layer, module)
        if target in weights.tensors:
            a, b = (factor.to(y0.dtype) for factor in weights.tensors[target])
            delta[:, columns] = weights.scales[target] * (x.to(y0.dtype) @ a.T) @ b.T
            if target in weights.row_scales:
                delta[:, columns] *= weights.row_scales[target].to(y0.dtype)
    return delta


class LoraPart:
    """The tokens of a step whose adapters are ``lora`` of one rank."""

    def __init__(
        self, segments: Sequence[Segment], rank: int, shape: BaseShape, records: Records
    ) -> None:
        self.rank = rank
        self.shape = shape
        self.records = records
        self.tokens = Tokens.of(segments, records.arena.device)
        self.tiling = Tiling.of(segments, records.arena.device)

    def apply(self, layer: int, group: Group, x: Tensor, y: Tensor) -> None:
        """Add the deltas to ``y``."""
        widths = [self.shape.dims[module].d_out for module in GROUPS[group]]
        rank = self.rank

        def both(tokens: Tensor, data: Tensor) -> Tensor:
            """Shrink and expand per tile, each module with its own rows and columns."""
            d_in = tokens.shape[-1]
            a = data[:, : len(widths) * rank * d_in].view(len(data), -1, d_in)
            bt = data[:, len(widths) * rank * d_in :].view(len(data), rank, -1)
            shrunk = torch.split(torch.bmm(tokens, a.transpose(1, 2)), rank, dim=-1)
            expanded = [
                torch.bmm(h, b) for h, b in zip(shrunk, torch.split(bt, widths, -1), strict=True)
            ]
            return expanded[0] if len(expanded) == 1 else torch.cat(expanded, dim=-1)

        delta = apply_tiles(
            self.tiling,
            self.records,
            self.tokens.take(x, self.records.arena.dtype),
            record_offset(self.shape, rank, layer, group),
            group_elements(self.shape, rank, group),
            both,
        )
        self.tokens.add(y, delta)
