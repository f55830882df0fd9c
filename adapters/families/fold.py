"""``fold``: MiSS and Bone adapters, ``delta = S_r(x) D``.

``S_r`` folds x with stride r (``S_r(x)[i] = Σ x[j] over j ≡ i mod r``): it belongs to no adapter,
so all adapters of one rank share it, as do the projections of a group, and ``S_q`` is a fold of
``S_r`` when q divides r.

A record holds ``[layer][group][r, n_group]`` of ``s·D``, the columns of a group's modules side by
side, zero where a target is absent. Zero-padding a smaller rank would be wrong here (a longer
fold is another function of x): the record's rank is the least common multiple of the targets'
ranks, and a target's rows repeat, which is exact.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.families.tiles import Records, Segment, Tiling, Tokens, apply_tiles
from shoal.adapters.spec import GROUPS, BaseShape, Group, Target
from shoal.adapters.weights import AdapterWeights, Terms

# Mixed ranks cost their least common multiple; beyond this the adapter is better served as lora.
RANK_MAX = 1024

# Below a cache line per row, the index costs more than the gather that it saves.
RUN_ELEMENTS_MIN = 16


def packed_rank(terms: Terms) -> int:
    """The rank all targets of a sum are packed at: the least common multiple of their own.

    Raises:
        AdapterRejected: it exceeds ``RANK_MAX``.
    """
    every = (parts for weights, _ in terms for parts in weights.tensors.values())
    ranks = {parts[0].shape[0] for parts in every} - {0}
    rank = math.lcm(*ranks) if ranks else 0
    if rank > RANK_MAX:
        raise AdapterRejected(
            "rank",
            f"targets have ranks {sorted(ranks)}, whose least common multiple {rank} "
            f"exceeds {RANK_MAX}",
        )
    return rank


def packed_elements(shape: BaseShape, rank: int) -> int:
    """Elements of one record."""
    return shape.num_layers * rank * sum(shape.group_dims(group).d_out for group in GROUPS)


def record_offset(shape: BaseShape, rank: int, layer: int, group: Group) -> int:
    """Where the ``(r, n_group)`` of one layer and group starts inside a record, in elements."""
    columns = layer * sum(shape.group_dims(g).d_out for g in GROUPS)
    for before in GROUPS:
        if before == group:
            break
        columns += shape.group_dims(before).d_out
    return columns * rank


def factors(d_matrix: Tensor, d_in: int) -> tuple[Tensor, Tensor]:
    """What it is as ``lora``: the 0/1 matrix of the fold, and ``Dᵀ``; exact in any dtype."""
    rank = d_matrix.shape[0]
    a = torch.zeros(rank, d_in, dtype=d_matrix.dtype)
    if rank:
        columns = torch.arange(d_in)
        a[columns % rank, columns] = 1.0
    return a, d_matrix.T.contiguous()


def pack(terms: Terms, shape: BaseShape, out: Tensor) -> None:
    """Fill ``out`` (1-D, ``packed_elements`` long, the bank's dtype) with a sum."""
    rank = packed_rank(terms)
    out.zero_()
    for layer in range(shape.num_layers):
        for group, modules in GROUPS.items():
            width = shape.group_dims(group).d_out
            offset = record_offset(shape, rank, layer, group)
            table = out.narrow(0, offset, rank * width).view(rank, width)
            start = 0
            for module in modules:
                columns = slice(start, start + shape.dims[module].d_out)
                start = columns.stop
                total = _summed(terms, Target(layer, module), rank)
                if total is not None:
                    table[:, columns] = total.to(out.dtype)


def _summed(terms: Terms, target: Target, rank: int) -> Tensor | None:
    """``Σ factor·s·D`` of one target: ``(rank, d_out)`` float64; None where nobody changes it."""
    total = None
    for weights, factor in terms:
        parts = weights.tensors.get(target)
        if parts is None or parts[0].shape[0] == 0:
            continue
        scaled = parts[0].to(torch.float64) * (weights.scales[target] * factor)
        repeated = scaled.repeat(rank // parts[0].shape[0], 1)
        total = repeated if total is None else total.add_(repeated)
    return total


def reference(
    weights: AdapterWeights,
    shape: BaseShape,
    layer: int,
    group: Group,
    x: Tensor,
    y0: Tensor,
    factors: Mapping[Target, Tensor],
) -> Tensor:
    """What one adapter adds to ``y0 (tokens, n_group)``, input by input, in ``y0``'s dtype."""
    delta = torch.zeros_like(y0)
    start = 0
    for module in GROUPS[group]:
        columns = slice(start, start + shape.dims[module].d_out)
        start = columns.stop
        target = Target(layer, module)
        if target in weights.tensors and weights.tensors[target][0].shape[0]:
            d_matrix = weights.tensors[target][0].to(y0.dtype)
            folded = torch.zeros(x.shape[0], d_matrix.shape[0], dtype=y0.dtype)
            for j in range(x.shape[1]):
                folded[:, j % d_matrix.shape[0]] += x[:, j].to(y0.dtype)
            delta[:, columns] = weights.scales[target] * folded @ d_matrix
    return delta


def fold(x: Tensor, rank: int) -> Tensor:
    """``S_r(x)``: ``(tokens, d)`` to ``(tokens, rank)`` float32; rank need not divide d."""
    whole = x.shape[1] // rank * rank
    if whole == 0:
        return torch.nn.functional.pad(x.float(), (0, rank - x.shape[1]))
    folded = x[:, :whole].view(x.shape[0], -1, rank).sum(1, dtype=torch.float32)
    if whole < x.shape[1]:
        folded[:, : x.shape[1] - whole] += x[:, whole:]
    return folded


class FoldPart:
    """The tokens of a step whose adapters are ``fold``, of any ranks.

    x is folded once for the largest ranks; ranks that divide one of them fold its result again.
    """

    def __init__(
        self, segments: Mapping[int, Sequence[Segment]], shape: BaseShape, records: Records
    ) -> None:
        """``segments``: by rank, each in ascending order."""
        self.shape = shape
        self.records = records
        self._run = _run_elements(shape, records)
        self._shared: list[_SharedFold] = []
        left = sorted(segments, reverse=True)
        while left:
            ranks = [rank for rank in left if left[0] % rank == 0]
            left = [rank for rank in left if rank not in ranks]
            chosen = {rank: segments[rank] for rank in ranks}
            self._shared.append(_SharedFold(chosen, records.arena.device))

    def apply(self, layer: int, group: Group, x: Tensor, y: Tensor) -> None:
        """Add the deltas to ``y``."""
        dtype = self.records.arena.dtype
        width = self.shape.group_dims(group).d_out
        for shared in self._shared:
            folded = fold(shared.tokens.take(x), shared.rank)
            for member in shared.members:
                own = member.within.take(folded)
                if member.rank != shared.rank:
                    own = fold(own, member.rank)
                offset = record_offset(self.shape, member.rank, layer, group)
                delta = apply_tiles(
                    member.tiling,
                    self.records,
                    own.to(dtype),
                    offset,
                    member.rank * width,
                    _expand,
                    single=partial(self._sum_rows, member, width, offset) if self._run else None,
                )
                member.tokens.add(y, delta)

    def _sum_rows(
        self, member: "_Member", width: int, offset: int, folded: Tensor, units: Tensor
    ) -> Tensor:
        """``S D`` for tokens that each have their own record, read in place.

        A gather would write the record and read it again. Here each output is a weighted sum of
        arena rows, which torch fuses on a CPU: 0.7 ms instead of 1.3 for 64 records of rank 16
        and 3072 columns (two cores). The arena is seen as rows of ``_run`` elements.
        """
        index = member.index.get(width)
        if index is None:
            blocks = torch.arange(width // self._run)[:, None]
            rows = torch.arange(member.rank)[None, :] * (width // self._run)
            first = units * (self.records.unit_elements // self._run)
            index = (first[:, None, None] + blocks + rows).view(-1, member.rank)
            member.index[width] = index
        weights = folded.expand(-1, width // self._run, -1).reshape(-1, member.rank)
        sums = torch.nn.functional.embedding_bag(
            index + offset // self._run,
            self.records.arena.view(-1, self._run),
            mode="sum",
            per_sample_weights=weights,
        )
        return sums.view(-1, 1, width)


class _Member:
    """The tokens of one rank: in the step, and within the tokens that share a fold."""

    def __init__(
        self,
        rank: int,
        segments: Sequence[Segment],
        shared: Sequence[Segment],
        device: torch.device,
    ) -> None:
        self.rank = rank
        self.tokens = Tokens.of(segments, device)
        self.tiling = Tiling.of(segments, device)
        self.index: dict[int, Tensor] = {}  # by group width, see FoldPart._sum_rows
        places: dict[int, int] = {}
        place = 0
        for segment in shared:
            places[segment.start] = place
            place += segment.length
        inside = [segment._replace(start=places[segment.start]) for segment in segments]
        self.within = Tokens.of(inside, device)


class _SharedFold:
    """Ranks that divide the first one, and all of their tokens."""

    def __init__(self, segments: Mapping[int, Sequence[Segment]], device: torch.device) -> None:
        self.rank = max(segments)
        together = sorted(
            (segment for own in segments.values() for segment in own), key=lambda s: s.start
        )
        self.tokens = Tokens.of(together, device)
        self.members = [_Member(rank, own, together, device) for rank, own in segments.items()]


def _run_elements(shape: BaseShape, records: Records) -> int:
    """Longest run that every row of every record is a whole number of; 0 where not worth it."""
    if records.arena.device.type != "cpu" or records.arena.dtype != torch.float32:
        return 0
    widths = [shape.group_dims(group).d_out for group in GROUPS]
    run = math.gcd(records.unit_elements, *widths)
    return run if run >= RUN_ELEMENTS_MIN else 0


def _expand(folded: Tensor, data: Tensor) -> Tensor:
    """``S D`` per tile: ``(tiles, size, r)`` with ``(tiles, r*n)``."""
    return torch.bmm(folded, data.view(data.shape[0], folded.shape[-1], -1))
