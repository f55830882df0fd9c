"""A mixed step against each adapter's own plain formula, in float64."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from shoal.adapters.bank import AdapterBank
from shoal.adapters.basis import Basis
from shoal.adapters.families import core, fold, lora, scale, tiles
from shoal.adapters.packing import pack_adapter
from shoal.adapters.spec import (
    GROUPS,
    MODULES,
    UNIT_ELEMENTS,
    BaseShape,
    Dims,
    Family,
    Group,
    RowAdapter,
    Slot,
    Target,
)
from shoal.adapters.weights import AdapterWeights, Correction

# Nothing divides anything: group widths 46, 26, 70, 26.
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
# Everything is a multiple of 16: records can be read in runs.
EVEN = BaseShape(
    name="even",
    digest="0" * 64,
    num_layers=2,
    dims={
        "q_proj": Dims(32, 32),
        "k_proj": Dims(16, 32),
        "v_proj": Dims(16, 32),
        "o_proj": Dims(32, 32),
        "gate_proj": Dims(48, 32),
        "up_proj": Dims(48, 32),
        "down_proj": Dims(32, 48),
    },
)
REFERENCES = {"core": core.reference, "fold": fold.reference, "lora": lora.reference}


def random(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *size: torch.randn(*size, generator=generator)


def make_basis(shape: BaseShape, name: str, seed: int, rank: int = 16) -> Basis:
    rand = random(seed)
    factors = {}
    for target in shape.targets():
        dims = shape.dims[target.module]
        factors[target] = torch.linalg.qr(rand(dims.d_out, min(rank, *dims)))[0]
    return Basis(id=name, rank=rank, factors=factors, kind="canonical")


BASES = {
    shape.name: {name: make_basis(shape, name, i) for i, name in enumerate(("basis-a", "basis-b"))}
    for shape in (SHAPE, EVEN)
}


def make_weights(
    family: Family,
    rank: int,
    seed: int,
    *,
    shape: BaseShape = SHAPE,
    basis_id: str | None = None,
    skip: frozenset[str] = frozenset(),
    ranks: Mapping[str, int] = {},
) -> AdapterWeights:
    """Random weights; ``ranks`` overrides the rank of some modules, ``skip`` leaves some out."""
    rand = random(seed)
    tensors: dict[Target, tuple[Tensor, ...]] = {}
    scales = {}
    for target in shape.targets():
        if target.module in skip:
            continue
        d_out, d_in = shape.dims[target.module]
        own = ranks.get(target.module, rank)
        if family == "core":
            own = min(own, d_out, d_in)
            tensors[target] = (rand(own, own),)
        elif family == "fold":
            tensors[target] = (rand(own, d_out),)
        else:
            tensors[target] = (rand(own, d_in), rand(d_out, own))
        scales[target] = 0.25 + 0.5 * len(tensors)
    return AdapterWeights("test", family, tensors, scales, basis_id)


def with_correction(
    weights: AdapterWeights, rank: int, basis_id: str, modules: tuple[str, ...] = MODULES
) -> AdapterWeights:
    """As trained on a residual base, in some of its modules; ranks differ between them."""
    ranks = {
        target: min(1 + (rank - 1) // (1 + target.layer), *SHAPE.dims[target.module])
        for target in weights.tensors
        if target.module in modules
    }
    scales = {target: 1.0 + 0.1 * i for i, target in enumerate(ranks)}
    correction = Correction("olora", basis_id, ranks, scales)
    return replace(weights, correction=correction)


def with_row_scales(
    weights: AdapterWeights, shape: BaseShape, modules: tuple[str, ...] = MODULES
) -> AdapterWeights:
    """DoRA, in some of its modules."""
    rand = random(len(modules))
    g = {
        target: 1 + 0.5 * rand(shape.dims[target.module].d_out)
        for target in weights.tensors
        if target.module in modules
    }
    return replace(weights, row_scales=g)


def expected_delta(
    weights: AdapterWeights, shape: BaseShape, layer: int, group: Group, x: Tensor, y0: Tensor
) -> Tensor:
    """What the adapter adds to ``y0``, from the definition of each of its sections."""

    def factors(basis_id: str | None) -> Mapping[Target, Tensor]:
        return BASES[shape.name][basis_id].factors if basis_id else {}

    inputs = (shape, layer, group, x, y0)
    delta = REFERENCES[weights.family](weights, *inputs, factors(weights.basis_id))
    if weights.row_scales:
        delta = delta + scale.reference(weights, *inputs, {})
    if weights.correction is not None:
        correction = core.of_correction(weights.correction)
        delta = delta + core.reference(correction, *inputs, factors(correction.basis_id))
    return delta


@dataclass
class Loaded:
    """A bank with adapters in it, placed with gaps."""

    shape: BaseShape = SHAPE
    bank: AdapterBank = field(init=False)
    weights: dict[RowAdapter, AdapterWeights] = field(default_factory=dict)
    next_unit: int = 3

    def __post_init__(self) -> None:
        self.bank = AdapterBank(
            self.shape,
            capacity_bytes=4 << 20,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        self.bank._records.arena.fill_(float("nan"))
        for basis in BASES[self.shape.name].values():
            self.bank.add_basis(basis)

    def add(self, weights: AdapterWeights) -> RowAdapter:
        packed = pack_adapter(weights, self.shape, f"digest-{self.next_unit}", torch.float32)
        units = -(-packed.spec.packed_elements // UNIT_ELEMENTS)
        adapter = RowAdapter(packed.spec, Slot(self.next_unit, units))
        self.next_unit += units + 1
        self.bank.load(adapter, packed)
        self.weights[adapter] = weights
        return adapter

    def check(self, rows: Sequence[tuple[RowAdapter | None, int]], seed: int = 0) -> None:
        """Every layer and group of a step over ``rows`` equals the reference of each row alone."""
        step = self.bank.step(rows)
        total = sum(n for _, n in rows)
        rand = random(seed)
        for layer in range(self.shape.num_layers):
            for group in GROUPS:
                dims = self.shape.group_dims(group)
                x, y0 = rand(total, dims.d_in), rand(total, dims.d_out)
                y = y0.clone()
                assert step is not None
                step.apply(layer, group, x, y)
                start = 0
                for adapter, length in rows:
                    part = slice(start, start + length)
                    start += length
                    if adapter is None:
                        assert torch.equal(y[part], y0[part])
                        continue
                    weights = self.weights[adapter]
                    expected = y0[part].double() + expected_delta(
                        weights, self.shape, layer, group, x[part].double(), y0[part].double()
                    )
                    error = (y[part].double() - expected).norm() / expected.norm()
                    assert error < 1e-5, (layer, group, adapter.spec)


def all_kinds(shape: BaseShape = SHAPE) -> list[AdapterWeights]:
    """One adapter of every kind that may share a batch; fold ranks 1, 2 and 13 divide 26."""
    some = frozenset({"k_proj", "up_proj", "o_proj"})
    make = partial(make_weights, shape=shape)
    return [
        *(make("core", r, r, basis_id="basis-a") for r in (1, 4, 8, 16)),
        *(make("core", r, 50 + r, basis_id="basis-b") for r in (4, 8)),
        make("core", 8, 60, basis_id="basis-a", skip=some),
        make("core", 8, 61, basis_id="basis-b", ranks={"q_proj": 0, "down_proj": 3}),
        *(make("fold", r, 70 + r) for r in (1, 2, 4, 8, 12, 13, 30)),
        make("fold", 8, 90, skip=some),
        make("fold", 4, 91, ranks={"q_proj": 6, "v_proj": 0}),
        *(make("lora", r, 100 + r) for r in (1, 2, 3, 8, 16)),
        make("lora", 8, 120, skip=some),
        make("lora", 8, 121, ranks={"gate_proj": 0, "k_proj": 2}),
        *(
            with_correction(make("lora", r, 130 + r), size, basis_id)
            for r, size, basis_id in ((8, 8, "basis-a"), (4, 16, "basis-a"), (16, 5, "basis-b"))
        ),
        with_correction(make("lora", 8, 150, skip=some), 8, "basis-b", ("v_proj", "down_proj")),
        with_correction(make("lora", 4, 151, ranks={"q_proj": 0}), 4, "basis-a"),
        with_correction(make("lora", 0, 152), 6, "basis-a"),  # nothing but the correction
        *(with_row_scales(make("lora", r, 160 + r), shape) for r in (1, 8, 16)),
        with_row_scales(make("lora", 8, 180, skip=some), shape, ("v_proj", "down_proj")),
        with_row_scales(make("lora", 4, 181, ranks={"q_proj": 0}), shape),
        with_row_scales(make("lora", 0, 182), shape),  # nothing but the scales
    ]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", [SHAPE, EVEN], ids=lambda shape: shape.name)
def test_a_mixed_step_equals_each_row_alone(seed: int, shape: BaseShape) -> None:
    loaded = Loaded(shape)
    adapters: list[RowAdapter | None] = [loaded.add(weights) for weights in all_kinds(shape)]
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    choices = [*adapters, None, None, None]
    rows = [(choices[draw(len(choices))], 1) for _ in range(40)]
    rows += [(choices[draw(len(choices))], 1 + draw(70)) for _ in range(8)]
    if seed % 2:  # in any order, not only decode rows first
        rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
    loaded.check(rows, seed)


def test_a_correction_is_taken_from_y0_and_not_from_what_was_added_to_it() -> None:
    """By hand: B is the first unit vector, and the LoRA adds 100 to the output it takes away."""
    target = Target(0, "o_proj")
    d_out, d_in = SHAPE.dims["o_proj"]
    unit = torch.eye(d_out)[:, :1]
    basis = Basis(id="unit", rank=1, factors={target: unit}, kind="uploaded")
    a = torch.zeros(1, d_in)
    a[0, 0] = 100.0
    weights = AdapterWeights(
        "lora",
        "lora",
        {target: (a, unit)},
        {target: 1.0},
        correction=Correction("olora", "unit", {target: 1}, {target: 0.5}),
    )
    loaded = Loaded()
    loaded.bank.add_basis(basis)
    adapter = loaded.add(weights)
    plain = loaded.add(make_weights("lora", 4, 1))
    x, y0 = torch.zeros(3, d_in), torch.ones(3, d_out)
    x[:, 0] = 1.0
    for rows in (
        [(adapter, 3)],
        [(adapter, 1), (plain, 1), (adapter, 1)],
        [(None, 2), (adapter, 1)],
    ):
        step = loaded.bank.step(rows)
        assert step is not None
        y = y0.clone()
        step.apply(0, "o", x, y)
        # 1 - 0.5 + 100; had the 100 come first: 101 - 0.5 * 101
        assert y[2].tolist() == [100.5] + [1.0] * (d_out - 1)


def test_row_scales_multiply_y0_and_the_delta_once_each() -> None:
    """By hand: g (y0 + delta), not g (g y0 + delta) nor g y0 + delta."""
    target = Target(1, "down_proj")
    d_out, d_in = SHAPE.dims["down_proj"]
    factors = (torch.eye(1, d_in), torch.ones(d_out, 1))
    g = torch.linspace(0.5, 3.0, d_out)
    weights = AdapterWeights(
        "dora", "lora", {target: factors}, {target: 2.0}, row_scales={target: g}
    )
    loaded = Loaded()
    adapter = loaded.add(weights)
    step = loaded.bank.step([(adapter, 1), (None, 1)])
    assert step is not None
    x, y = torch.zeros(2, d_in), torch.full((2, d_out), 10.0)
    x[:, 0] = 3.0
    step.apply(1, "down", x, y)
    torch.testing.assert_close(y[0], g * (10.0 + 2.0 * 3.0))
    assert torch.equal(y[1], torch.full((d_out,), 10.0))


@pytest.mark.parametrize("index", range(len(all_kinds())))
def test_one_adapter_for_all_rows(index: int) -> None:
    loaded = Loaded()
    adapter = loaded.add(all_kinds()[index])
    loaded.check([(adapter, 1), (adapter, 1), (adapter, 300)])
    loaded.check([(adapter, 1)])


@pytest.mark.parametrize("family", ["core", "fold", "lora"])
@pytest.mark.parametrize("shape", [SHAPE, EVEN], ids=lambda shape: shape.name)
def test_decode_rows_that_each_have_their_own_adapter(family: Family, shape: BaseShape) -> None:
    loaded = Loaded(shape=shape)
    make = partial(make_weights, shape=shape, basis_id="basis-a" if family == "core" else None)
    adapters = [loaded.add(make(family, 4, seed)) for seed in range(12)]
    loaded.check([(adapter, 1) for adapter in adapters])
    loaded.check([(None, 1), *((adapter, 1) for adapter in adapters), (None, 5)])


@pytest.mark.parametrize("family", ["core", "fold", "lora"])
def test_gathers_are_worked_off_in_turns_when_they_are_large(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "GATHER_BYTES", 5000)
    loaded = Loaded()
    basis_id = "basis-b" if family == "core" else None
    adapters = [loaded.add(make_weights(family, 8, s, basis_id=basis_id)) for s in range(30)]
    loaded.check([(adapter, 1) for adapter in adapters] + [(a, 20) for a in adapters[::7]])


@pytest.mark.parametrize("family", ["core", "fold", "lora"])
def test_a_row_that_is_not_finite_stays_alone(family: Family) -> None:
    loaded = Loaded()
    basis_id = "basis-a" if family == "core" else None
    first, second = (loaded.add(make_weights(family, 4, s, basis_id=basis_id)) for s in (1, 2))
    rows: list[tuple[RowAdapter | None, int]] = [(first, 3), (second, 1), (None, 1)]
    step = loaded.bank.step(rows)
    assert step is not None
    dims = SHAPE.group_dims("qkv")
    x, y = torch.ones(5, dims.d_in), torch.ones(5, dims.d_out)
    x[1], y[1] = float("nan"), float("nan")
    step.apply(0, "qkv", x, y)
    assert y[[0, 2, 3, 4]].isfinite().all()


@pytest.mark.parametrize("family", ["core", "fold", "lora"])
def test_absent_targets_add_exactly_nothing(family: Family) -> None:
    loaded = Loaded()
    basis_id = "basis-a" if family == "core" else None
    skip = frozenset(MODULES) - {"q_proj"}
    adapter = loaded.add(make_weights(family, 4, 1, basis_id=basis_id, skip=skip))
    step = loaded.bank.step([(adapter, 1), (adapter, 9), (None, 1)])
    assert step is not None
    rand = random(3)
    for group in GROUPS:
        dims = SHAPE.group_dims(group)
        x, y0 = rand(11, dims.d_in), rand(11, dims.d_out)
        y = y0.clone()
        step.apply(1, group, x, y)
        first = SHAPE.dims["q_proj"].d_out if group == "qkv" else 0
        assert torch.equal(y[:, first:], y0[:, first:])
        assert group != "qkv" or not torch.equal(y[:10, :first], y0[:10, :first])


@pytest.mark.parametrize("family", ["core", "fold", "lora"])
def test_a_16_bit_step_over_a_float32_bank(family: Family) -> None:
    loaded = Loaded()
    basis_id = "basis-a" if family == "core" else None
    weights = make_weights(family, 4, 1, basis_id=basis_id)
    adapter = loaded.add(weights)
    for rows in (
        [(adapter, 6)],
        [(None, 1), (adapter, 5)],
        [(adapter, 3), (None, 1), (adapter, 2)],
    ):
        step = loaded.bank.step(rows)
        assert step is not None
        rand = random(5)
        dims = SHAPE.group_dims("down")
        x, y0 = rand(6, dims.d_in).bfloat16(), rand(6, dims.d_out).bfloat16()
        y = y0.clone()
        step.apply(0, "down", x, y)
        expected = REFERENCES[family](
            weights, SHAPE, 0, "down", x.double(), y0.double(), BASES["tiny"]["basis-a"].factors
        )
        start = 0
        for used, length in rows:
            part = slice(start, start + length)
            start += length
            want = y0[part].double() + (expected[part] if used else 0)
            torch.testing.assert_close(y[part].double(), want, rtol=1e-2, atol=1e-2)


def test_fold_is_the_strided_sum() -> None:
    x = torch.arange(1.0, 8.0)[None]  # 1..7
    assert fold.fold(x, 3).tolist() == [[1 + 4 + 7, 2 + 5, 3 + 6]]
    assert fold.fold(x, 9).tolist() == [[1, 2, 3, 4, 5, 6, 7, 0, 0]]


def test_a_core_delta_by_hand() -> None:
    """s·(h Rᵀ) Bᵀ with B the first two unit vectors: R mixes the first two outputs of y0."""
    factors = {t: torch.eye(SHAPE.dims[t.module].d_out)[:, :2] for t in SHAPE.targets()}
    target = Target(0, "o_proj")
    r_matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    weights = AdapterWeights("test", "core", {target: (r_matrix,)}, {target: 0.5}, "basis-a")
    y0 = torch.zeros(1, SHAPE.group_dims("o").d_out)
    y0[0, :3] = torch.tensor([10.0, 1.0, 7.0])
    delta = core.reference(weights, SHAPE, 0, "o", y0, y0, factors)
    assert delta[0, :3].tolist() == [0.5 * (10 + 2), 0.5 * (30 + 4), 0.0]


@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (257, 3, 1), (5, 64, 700, 2)])
def test_tiles_cover_every_token_once(lengths: tuple[int, ...]) -> None:
    segments, start = [], 0
    for unit, length in enumerate(lengths):
        segments.append(tiles.Segment(unit, start, length))
        start += length
    tiling = tiles.Tiling.of(segments, torch.device("cpu"))
    owner = torch.tensor([u for u, n in enumerate(lengths) for _ in range(n)])
    tokens = torch.arange(start)
    seen, units = [], []
    for batch in tiling.batches:
        index = tokens if batch.index is None else batch.index
        seen.append(index)
        units.append(batch.units.repeat_interleave(batch.size))
    seen_all, units_all = torch.cat(seen), torch.cat(units)
    inverse = tokens if tiling.inverse is None else tiling.inverse
    assert torch.equal(seen_all[inverse], tokens)
    assert torch.equal(units_all[inverse], owner)
    assert torch.equal(owner[seen_all], units_all)  # padding stays within its own segment
    assert len(seen_all) <= 4 * start
