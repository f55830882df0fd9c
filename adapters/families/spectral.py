"""``spectral``: SVF and SVFT adapters, a sparse ``M`` in the singular basis of each weight.

``delta = ((x V) Mᵀ) Uᵀ`` with the thin SVD ``W = U diag(σ) Vᵀ``, which belongs to the base and is
shared by all. A target's M has up to ``rank`` entries: SVF's is diagonal, SVFT's has a pattern.
The two dense products cost as much as the base's own, twice; what is an adapter's is small.

A record holds ``[layer][module][ rows | columns | s·values ]``, each ``entries(…)`` long, zero
where a target is absent or has fewer: an entry (0, 0) of value 0. Rows and columns are integers
whose bits lie in elements of the bank's dtype: they are copied and looked at as integers, never
calculated with. Below ``COMPONENTS_MAX`` no such pattern is infinite or NaN in any dtype.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.families import tiles
from shoal.adapters.families.tiles import Records, Segment, Tiling, Tokens, apply_tiles
from shoal.adapters.spec import GROUPS, MODULES, BaseShape, Group, Target
from shoal.adapters.spectral_basis import Factors
from shoal.adapters.weights import AdapterWeights, Terms

# float16's exponent is all ones from 0x7C00 on: the smallest such index of the three dtypes.
COMPONENTS_MAX = 0x7C00
# Entries of M per singular component. Each costs a token a gathered multiply-add, which is some ten
# times a GEMM's; up to here that is less than the two dense products of a target.
ENTRIES_PER_COMPONENT = 64

_INTEGERS = {2: torch.int16, 4: torch.int32}


def entries(shape: BaseShape, module: str, rank: int) -> int:
    """Room for entries of one target in a record: there are no more than ``k²``."""
    return min(rank, min(shape.dims[module]) ** 2)


def packed_elements(shape: BaseShape, rank: int) -> int:
    """Elements of one record."""
    return shape.num_layers * 3 * sum(entries(shape, module, rank) for module in MODULES)


def record_offset(shape: BaseShape, rank: int, layer: int, module: str) -> int:
    """Where the rows of one target start inside a record, in elements."""
    before = MODULES[: MODULES.index(module)]
    inside = 3 * sum(entries(shape, other, rank) for other in before)
    return layer * (packed_elements(shape, rank) // shape.num_layers) + inside


def packed_rank(terms: Terms) -> int:
    """The most entries that a target of a sum has: places that several share count once."""
    if len(terms) == 1:
        return terms[0].weights.rank  # of shapes alone
    return max((len(values) for _, _, values in summed(terms).values()), default=0)


def summed(terms: Terms) -> dict[Target, tuple[Tensor, Tensor, Tensor]]:
    """Rows, columns and ``Σ factor·s·values`` (float64) per target, sorted, each place once."""
    found: dict[Target, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for weights, factor in terms:
        for target, (rows, columns, values) in weights.tensors.items():
            scaled = values.to(torch.float64) * (weights.scales[target] * factor)
            found.setdefault(target, []).append((rows, columns, scaled))
    return {target: _merged(parts) for target, parts in found.items()}


def _merged(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    if len(parts) == 1:
        return parts[0]
    rows, columns, values = (torch.cat(same) for same in zip(*parts, strict=True))
    width = int(columns.max()) + 1 if len(columns) else 1
    places, where = torch.unique(rows.long() * width + columns, return_inverse=True)
    sums = torch.zeros(len(places), dtype=torch.float64).index_add_(0, where, values)
    return places // width, places % width, sums


def pack(terms: Terms, shape: BaseShape, out: Tensor) -> None:
    """Fill ``out`` (1-D, ``packed_elements`` long, the bank's dtype) with a sum.

    Raises:
        AdapterRejected: a target has more than ``COMPONENTS_MAX`` singular components.
    """
    rank = packed_rank(terms)
    out.zero_()
    for target, (rows, columns, values) in summed(terms).items():
        if min(shape.dims[target.module]) > COMPONENTS_MAX:
            raise AdapterRejected(
                str(target), f"spectral adapters have at most {COMPONENTS_MAX} components"
            )
        room = entries(shape, target.module, rank)
        offset = record_offset(shape, rank, target.layer, target.module)
        table = out.narrow(0, offset, 3 * room).view(3, room)
        integer = _INTEGERS[out.dtype.itemsize]
        count = len(values)
        table[0, :count] = rows.to(integer).view(out.dtype)
        table[1, :count] = columns.to(integer).view(out.dtype)
        table[2, :count] = values.to(out.dtype)


def reference(
    weights: AdapterWeights,
    shape: BaseShape,
    layer: int,
    group: Group,
    x: Tensor,
    y0: Tensor,
    factors: Mapping[Target, Factors],
) -> Tensor:
    """What one adapter adds to ``y0 (tokens, n_group)``, entry by entry, in ``y0``'s dtype."""
    delta = torch.zeros_like(y0)
    start = 0
    for module in GROUPS[group]:
        outputs = slice(start, start + shape.dims[module].d_out)
        start = outputs.stop
        target = Target(layer, module)
        if target in weights.tensors:
            rows, columns, values = weights.tensors[target]
            u, _, v = (part.to(y0.dtype) for part in factors[target])
            t = x.to(y0.dtype) @ v
            turned = torch.zeros_like(t)
            for i, j, value in zip(rows.tolist(), columns.tolist(), values.tolist(), strict=True):
                turned[:, i] += value * t[:, j]
            delta[:, outputs] = weights.scales[target] * turned @ u.T
    return delta


class DeviceFactors:
    """The singular vectors that some resident adapter needs, on the device. Only ever grows."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        self._kept: dict[Target, tuple[Tensor, Tensor]] = {}

    def __contains__(self, target: Target) -> bool:
        return target in self._kept

    def copied(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """U and Vᵀ of a target, for ``keep``; σ is in every adapter's M. May be under way."""
        u = factors.u.to(self._device, self._dtype).contiguous()
        vt = factors.v.T.to(self._device, self._dtype).contiguous()
        return u, vt

    def keep(self, made: Mapping[Target, tuple[Tensor, Tensor]]) -> None:
        """Have what ``copied`` made, which must have arrived, be used from now on."""
        self._kept.update(made)

    def get(self, layer: int, module: str) -> tuple[Tensor, Tensor] | None:
        """``U (d_out, k)`` and ``Vᵀ (k, d_in)``; None when no adapter changes the target."""
        return self._kept.get(Target(layer, module))


def factors_elements(shape: BaseShape, target: Target) -> int:
    """Elements of U and V of a target."""
    return sum(shape.dims[target.module]) * min(shape.dims[target.module])


class SpectralPart:
    """The tokens of a step whose adapters are ``spectral``, of any ranks.

    The dense products are of all of them together; between those each rank has its own layout of
    records.
    """

    def __init__(
        self,
        segments: Mapping[int, Sequence[Segment]],
        factors: DeviceFactors,
        shape: BaseShape,
        records: Records,
    ) -> None:
        """``segments``: by rank, each in ascending order."""
        self.factors = factors
        self.shape = shape
        self.records = records
        device = records.arena.device
        together = sorted((s for own in segments.values() for s in own), key=lambda s: s.start)
        self.tokens = Tokens.of(together, device)
        places: dict[int, int] = {}
        place = 0
        for segment in together:
            places[segment.start] = place
            place += segment.length
        self._members: list[tuple[int, Tokens, Tiling]] = []
        for rank, own in segments.items():
            inside = [segment._replace(start=places[segment.start]) for segment in own]
            self._members.append((rank, Tokens.of(inside, device), Tiling.of(own, device)))

    def apply(self, layer: int, group: Group, x: Tensor, y: Tensor) -> None:
        """Add the deltas to ``y``."""
        own = None
        start = 0
        for module in GROUPS[group]:
            width = self.shape.dims[module].d_out
            outputs = y.narrow(1, start, width)
            start += width
            found = self.factors.get(layer, module)
            if found is None:
                continue
            u, vt = found
            if own is None:
                own = self.tokens.take(x, self.records.arena.dtype)
            turned = self._turn(layer, module, torch.nn.functional.linear(own, vt))
            self.tokens.add(outputs, torch.nn.functional.linear(turned, u))

    def _turn(self, layer: int, module: str, t: Tensor) -> Tensor:
        """``t Mᵀ`` for ``t (tokens, k)``, each token with its own M."""
        turned = torch.empty_like(t)
        for rank, tokens, tiling in self._members:
            part = apply_tiles(
                tiling,
                self.records,
                tokens.take(t),
                record_offset(self.shape, rank, layer, module),
                3 * entries(self.shape, module, rank),
                _sparse,
            )
            if tokens.index is not None:
                turned.index_copy_(0, tokens.index, part)
            else:
                turned.narrow(0, tokens.start, tokens.count).copy_(part)
        return turned


def _sparse(t: Tensor, data: Tensor) -> Tensor:
    """``t Mᵀ`` per tile: ``(tiles, size, k)`` with ``(tiles, 3·entries)``, summed in float32."""
    table = data.view(len(data), 3, -1)
    integers = table[:, :2].view(_INTEGERS[data.element_size()]).to(torch.int64)
    rows, columns, values = integers[:, 0], integers[:, 1], table[:, 2].float()
    out = torch.zeros(t.shape, dtype=torch.float32, device=t.device)
    count = values.shape[1]
    # Every token of every tile takes a float and an index per entry for a moment.
    step = max(1, tiles.GATHER_BYTES // (len(data) * count * 4))
    for first in range(0, t.shape[1], step):
        part = t[:, first : first + step].float()
        size = part.shape[1]
        picked = part.gather(2, columns[:, None].expand(-1, size, -1)) * values[:, None]
        out[:, first : first + size].scatter_add_(2, rows[:, None].expand(-1, size, -1), picked)
    return out.to(t.dtype)
