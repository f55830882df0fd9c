"""``spectral`` adapters in the bank and in a step, against dense float64 matrices."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.families import spectral, tiles
from shoal.adapters.families.spectral import DeviceFactors, SpectralPart
from shoal.adapters.families.tiles import Records, Segment
from shoal.adapters.spec import (
    GROUPS,
    MODULES,
    UNIT_ELEMENTS,
    BaseShape,
    Dims,
    Group,
    Target,
)
from shoal.adapters.spectral_basis import Factors
from shoal.adapters.weights import AdapterWeights, Term

# Taller than wide (gate, up), wider than tall (k, v, down), square; nothing divides anything.
SHAPE = BaseShape(
    name="tiny",
    digest="0" * 64,
    num_layers=2,
    dims={
        "q_proj": Dims(26, 26),
        "k_proj": Dims(10, 26),
        "v_proj": Dims(10, 26),
        "o_proj": Dims(26, 26),
        "gate_proj": Dims(35, 26),
        "up_proj": Dims(35, 26),
        "down_proj": Dims(26, 35),
    },
)
MLP = ("gate_proj", "up_proj", "down_proj")


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_factors() -> dict[Target, Factors]:
    generator = random(0)
    found = {}
    for target in SHAPE.targets():
        w = torch.randn(*SHAPE.dims[target.module], generator=generator)
        u, sigma, vt = torch.linalg.svd(w, full_matrices=False)
        found[target] = Factors(u, sigma, vt.T.contiguous())
    return found


FACTORS = make_factors()


def diagonal_weights(seed: int, modules: Sequence[str] = MODULES) -> AdapterWeights:
    """Like SVF: one entry per component."""
    generator = random(seed)
    tensors = {}
    for target in SHAPE.targets():
        if target.module in modules:
            k = min(SHAPE.dims[target.module])
            index = torch.arange(k, dtype=torch.int32)
            tensors[target] = (index, index, torch.randn(k, generator=generator))
    return AdapterWeights("svf", "spectral", tensors, dict.fromkeys(tensors, 1.0), "svd-0")


def sparse_weights(count: int, seed: int, modules: Sequence[str] = MODULES) -> AdapterWeights:
    """Random distinct places, ``count`` of them or all there are, one of value 0; odd scales."""
    generator = random(seed)
    tensors = {}
    for target in SHAPE.targets():
        if target.module in modules:
            k = min(SHAPE.dims[target.module])
            places = torch.randperm(k * k, generator=generator)[:count].sort().values
            values = torch.randn(len(places), generator=generator)
            values[0] = 0
            tensors[target] = ((places // k).int(), (places % k).int(), values)
    scales = {target: 0.25 + target.layer for target in tensors}
    return AdapterWeights("svft", "spectral", tensors, scales, "svd-0")


def dense_delta(weights: AdapterWeights, target: Target) -> Tensor:
    """``s U M Vᵀ`` in float64, ``(d_out, d_in)``."""
    u, _, v = (part.double() for part in FACTORS[target])
    m = torch.zeros(u.shape[1], v.shape[1], dtype=torch.float64)
    if target in weights.tensors:
        rows, columns, values = weights.tensors[target]
        m[rows.long(), columns.long()] = values.double() * weights.scales[target]
    return u @ m @ v.T


class Bank:
    """An arena of NaN with records in it."""

    def __init__(self, dtype: torch.dtype = torch.float32, known: Sequence[str] = MODULES) -> None:
        arena = torch.full((200 * UNIT_ELEMENTS,), float("nan"), dtype=dtype)
        self.records = Records(arena, UNIT_ELEMENTS)
        self.factors = DeviceFactors(torch.device("cpu"), dtype)
        for target in SHAPE.targets():
            if target.module in known:
                self.factors.keep({target: self.factors.copied(FACTORS[target])})
        self.next_unit = 2

    def load(self, weights: AdapterWeights) -> int:
        data = torch.empty(
            spectral.packed_elements(SHAPE, weights.rank), dtype=self.records.arena.dtype
        )
        spectral.pack([Term(weights)], SHAPE, data)
        assert bool(data.isfinite().all())
        unit = self.next_unit
        self.records.arena[unit * UNIT_ELEMENTS :][: len(data)] = data
        self.next_unit += -(-len(data) // UNIT_ELEMENTS) + 1
        return unit

    def apply(
        self,
        rows: Sequence[tuple[AdapterWeights | None, int, int]],
        layer: int,
        group: Group,
        x: Tensor,
        y: Tensor,
    ) -> None:
        """``rows``: adapter, unit, tokens."""
        segments: dict[int, list[Segment]] = {}
        start = 0
        for weights, unit, count in rows:
            if weights is not None:
                segments.setdefault(weights.rank, []).append(Segment(unit, start, count))
            start += count
        SpectralPart(segments, self.factors, SHAPE, self.records).apply(layer, group, x, y)


def check(
    bank: Bank, rows: Sequence[tuple[AdapterWeights | None, int, int]], tolerance: float = 1e-4
) -> None:
    total = sum(count for *_, count in rows)
    for layer in range(SHAPE.num_layers):
        for group in GROUPS:
            dims = SHAPE.group_dims(group)
            generator = random(layer)
            x = torch.randn(total, dims.d_in, generator=generator).to(bank.records.arena.dtype)
            y0 = torch.randn(total, dims.d_out, generator=generator).to(x.dtype)
            y = y0.clone()
            bank.apply(rows, layer, group, x, y)
            start = 0
            for weights, _, count in rows:
                own = slice(start, start + count)
                start += count
                if weights is None:
                    assert torch.equal(y[own], y0[own])
                    continue
                deltas = [dense_delta(weights, Target(layer, m)) for m in GROUPS[group]]
                want = y0[own].double() + x[own].double() @ torch.cat(deltas).T
                torch.testing.assert_close(
                    y[own].double(), want, rtol=tolerance, atol=tolerance * float(want.abs().max())
                )


KINDS = {
    "diagonal": lambda seed: diagonal_weights(seed),
    "mlp only": lambda seed: diagonal_weights(seed, MLP),
    "sparse": lambda seed: sparse_weights(60, seed),
    "one module": lambda seed: sparse_weights(7, seed, ("k_proj",)),
    "one entry": lambda seed: sparse_weights(1, seed),
    "dense": lambda seed: sparse_weights(10_000, seed),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_in_one_row_and_in_many(kind: str) -> None:
    bank, weights = Bank(), KINDS[kind](1)
    unit = bank.load(weights)
    for count in (1, 5, 70):
        check(bank, [(weights, unit, count)])


def test_reference_is_the_dense_product() -> None:
    weights = sparse_weights(40, 3, ("q_proj", "v_proj"))
    x = torch.randn(3, 26, dtype=torch.float64, generator=random(4))
    y0 = torch.zeros(3, 46, dtype=torch.float64)
    got = spectral.reference(weights, SHAPE, 1, "qkv", x, y0, FACTORS)
    want = x @ torch.cat([dense_delta(weights, Target(1, m)) for m in GROUPS["qkv"]]).T
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gather_bytes", [tiles.GATHER_BYTES, 3000])
def test_a_mixed_step(monkeypatch: pytest.MonkeyPatch, gather_bytes: int) -> None:
    """Ranks and tokens interleaved with the base's rows; also when data is worked off in turns."""
    monkeypatch.setattr(tiles, "GATHER_BYTES", gather_bytes)
    bank = Bank()
    loaded = [(weights, bank.load(weights)) for weights in (make(9) for make in KINDS.values())]
    loaded += [(weights, bank.load(weights)) for weights in (sparse_weights(60, s) for s in (5, 6))]
    rows: list[tuple[AdapterWeights | None, int, int]] = []
    for i, (weights, unit) in enumerate(loaded):
        rows += [(weights, unit, 1), (None, 0, 1 + i % 2)]
    rows += [(weights, unit, 3 + 9 * i) for i, (weights, unit) in enumerate(loaded)]
    check(bank, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_records_of_16_bits(dtype: torch.dtype) -> None:
    bank = Bank(dtype)
    first, second = diagonal_weights(1), sparse_weights(60, 2)
    rows = [(first, bank.load(first), 2), (None, 0, 1), (second, bank.load(second), 20)]
    check(bank, rows, tolerance=3e-2)


def test_what_no_adapter_changes_needs_no_vectors() -> None:
    bank, weights = Bank(known=MLP), diagonal_weights(1, MLP)
    check(bank, [(weights, bank.load(weights), 4), (None, 0, 2)])


def test_a_row_that_is_not_finite_stays_alone() -> None:
    bank, first, second = Bank(), diagonal_weights(1), sparse_weights(60, 2)
    rows = [(first, bank.load(first), 3), (second, bank.load(second), 1), (None, 0, 1)]
    x, y = torch.ones(5, 26), torch.ones(5, 46)
    x[1] = y[1] = float("nan")
    bank.apply(rows, 0, "qkv", x, y)
    assert y[[0, 2, 3, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_index_looks_infinite(dtype: torch.dtype) -> None:
    """What copies, and the check for overflow, may treat an index as a number of the bank."""
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    index = torch.arange(spectral.COMPONENTS_MAX, dtype=torch.int32)
    bits = index.to(integer).view(dtype)
    assert bool(bits.isfinite().all())
    assert torch.equal(bits.clone().view(integer).to(torch.int32), index)


def test_too_many_components_are_refused() -> None:
    size = spectral.COMPONENTS_MAX + 1
    shape = BaseShape("wide", "0" * 64, 1, dict.fromkeys(MODULES, Dims(size, size)))
    entry = torch.zeros(1, dtype=torch.int32)
    target = Target(0, "o_proj")
    weights = AdapterWeights(
        "svft", "spectral", {target: (entry, entry, torch.ones(1))}, {target: 1.0}, "svd-0"
    )
    with pytest.raises(AdapterRejected, match=r"layers\.0\.o_proj: .* at most 31744 components"):
        spectral.pack([Term(weights)], shape, torch.empty(spectral.packed_elements(shape, 1)))


def test_record_size_is_that_of_the_entries() -> None:
    # 26 components on five modules, 10 on two: a small weight has no more than k² entries.
    assert spectral.packed_elements(SHAPE, 26) == 2 * 3 * 7 * 26
    assert spectral.packed_elements(SHAPE, 200) == 2 * 3 * (5 * 200 + 2 * 100)
