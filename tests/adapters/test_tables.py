"""Steps through the device tables against the plain formulas of each row's adapter, on a CPU.

What is fused into the kernels behind the GEMMs is applied here by hand, from the widened weight's
output and the tables; the kernels themselves are tested where they are.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from shoal.adapters.bank import AdapterBank
from shoal.adapters.basis import Basis
from shoal.adapters.families import core, fold, lora, scale
from shoal.adapters.families.joint_basis import BLOCK
from shoal.adapters.packing import PackedAdapter, pack_adapter
from shoal.adapters.spec import (
    GROUPS,
    MODULES,
    UNIT_ELEMENTS,
    AdapterSpec,
    BaseShape,
    Dims,
    Family,
    Group,
    RowAdapter,
    Section,
    SectionKind,
    Slot,
    Target,
)
from shoal.adapters.tables import ActiveFamilies, Rows, StepParts, StepTables
from shoal.adapters.weights import AdapterWeights, Correction, Term, Terms

# Group widths 218, 78, 226, 78: nothing divides anything, and ranks up to 64 fit.
SHAPE = BaseShape(
    name="tiny",
    digest="0" * 64,
    num_layers=2,
    dims={
        "q_proj": Dims(78, 74),
        "k_proj": Dims(70, 74),
        "v_proj": Dims(70, 74),
        "o_proj": Dims(78, 78),
        "gate_proj": Dims(113, 78),
        "up_proj": Dims(113, 78),
        "down_proj": Dims(78, 113),
    },
)
REFERENCES = {"core": core.reference, "fold": fold.reference, "lora": lora.reference}
CPU = torch.device("cpu")


def random(seed: int) -> partial[Tensor]:
    return partial(torch.randn, generator=torch.Generator().manual_seed(seed))


def make_basis(name: str, seed: int, rank: int, *, skip: frozenset[str] = frozenset()) -> Basis:
    """``canonical`` when that is its name."""
    rand = random(seed)
    factors = {}
    for target in SHAPE.targets():
        if target.module not in skip:
            dims = SHAPE.dims[target.module]
            factors[target] = torch.linalg.qr(rand(dims.d_out, min(rank, *dims)))[0]
    kind = "canonical" if name == "canonical" else "uploaded"
    return Basis(id=name, rank=rank, factors=factors, kind=kind)  # type: ignore[arg-type]


# In the order in which they are added: the third upload finds no columns, the fourth would not
# have found them either.
BASES = {
    basis.id: basis
    for basis in (
        make_basis("canonical", 0, 64),
        make_basis("small", 1, 11),
        make_basis("second", 2, 16, skip=frozenset({"k_proj", "down_proj"})),
        make_basis("late", 3, 8),
        make_basis("large", 4, 40),
    )
}


def make_weights(
    family: Family, rank: int, seed: int, *, basis_id: str | None = None, skip: str = ""
) -> AdapterWeights:
    rand = random(seed)
    tensors: dict[Target, tuple[Tensor, ...]] = {}
    scales = {}
    for target in SHAPE.targets():
        if target.module == skip:
            continue
        d_out, d_in = SHAPE.dims[target.module]
        if family == "core":
            tensors[target] = (rand(rank, rank),)
        elif family == "fold":
            tensors[target] = (rand(rank, d_out),)
        else:
            tensors[target] = (rand(rank, d_in), rand(d_out, rank))
        scales[target] = 0.25 + 0.1 * len(tensors) / max(rank, 1)
    covered = None if basis_id is None else BASES[basis_id].factors
    if covered is not None:
        tensors = {target: parts for target, parts in tensors.items() if target in covered}
    return AdapterWeights("test", family, tensors, scales, basis_id)


def with_correction(weights: AdapterWeights, basis_id: str, *ranks: int) -> AdapterWeights:
    """As trained on a residual base; the ranks by turns over the targets of the basis."""
    covered = [target for target in weights.tensors if target in BASES[basis_id].factors]
    by_target = {
        target: min(ranks[i % len(ranks)], *SHAPE.dims[target.module])
        for i, target in enumerate(covered)
    }
    correction = Correction("milora", basis_id, by_target, dict.fromkeys(covered, 1.25))
    return replace(weights, correction=correction)


def with_row_scales(weights: AdapterWeights, *modules: str) -> AdapterWeights:
    """DoRA, in some of its modules or all."""
    rand = random(len(weights.tensors))
    g = {
        target: 1 + 0.5 * rand(SHAPE.dims[target.module].d_out)
        for target in weights.tensors
        if not modules or target.module in modules
    }
    return replace(weights, row_scales=g)


def expected_delta(
    weights: AdapterWeights, layer: int, group: Group, x: Tensor, y0: Tensor
) -> Tensor:
    """What the adapter adds to ``y0``, from the definition of each of its sections."""
    inputs = (SHAPE, layer, group, x, y0)
    factors = BASES[weights.basis_id].factors if weights.basis_id else {}
    delta = REFERENCES[weights.family](weights, *inputs, factors)
    if weights.row_scales:
        delta = delta + scale.reference(weights, *inputs, {})
    if weights.correction is not None:
        correction = core.of_correction(weights.correction)
        delta = delta + core.reference(
            correction, *inputs, BASES[weights.correction.basis_id].factors
        )
    return delta


def all_kinds() -> list[AdapterWeights]:
    return [
        *(make_weights("core", r, r, basis_id="canonical") for r in (1, 4, 8, 16, 32, 33, 64)),
        *(make_weights("core", r, 100 + r, basis_id="small") for r in (8, 11)),
        *(make_weights("core", r, 200 + r, basis_id="second") for r in (3, 16)),
        *(make_weights("core", r, 300 + r, basis_id="late") for r in (2, 8)),
        make_weights("core", 40, 340, basis_id="large"),
        make_weights("core", 16, 116, basis_id="canonical", skip="v_proj"),
        *(make_weights("fold", r, 400 + r) for r in (1, 4, 7, 16, 24, 64)),
        make_weights("fold", 8, 501, skip="gate_proj"),
        *(make_weights("lora", r, 600 + r) for r in (1, 5, 16, 64)),
        make_weights("lora", 8, 701, skip="k_proj"),
        # On the joint basis, the other two wide; alone, beside and behind a low-rank part.
        with_correction(make_weights("lora", 5, 710), "canonical", 16),
        with_correction(make_weights("lora", 64, 711), "canonical", 64, 1, 33),
        with_correction(make_weights("lora", 16, 712, skip="q_proj"), "second", 3, 16),
        with_correction(make_weights("lora", 1, 713), "late", 8, 2),
        with_correction(make_weights("lora", 8, 714), "large", 40),
        with_correction(make_weights("lora", 0, 715), "small", 11),
        *(with_row_scales(make_weights("lora", r, 720 + r)) for r in (1, 16, 64)),
        with_row_scales(make_weights("lora", 8, 790, skip="k_proj"), "v_proj", "up_proj"),
        with_row_scales(make_weights("lora", 0, 791)),
    ]


class Loaded:
    """A bank of adapters, placed with gaps, and a base whose weights have been widened."""

    def __init__(self, *, joint: bool = True, capacity_bytes: int = 24 << 20) -> None:
        self.bank = AdapterBank(
            SHAPE, capacity_bytes=capacity_bytes, device=CPU, dtype=torch.float32, joint=joint
        )
        self.bank.arena.fill_(float("nan"))
        self.terms: dict[RowAdapter, Terms] = {}
        self.next_unit = 3
        rand = random(9)
        self.base: dict[tuple[int, Group], Tensor] = {}
        for layer in range(SHAPE.num_layers):
            for group, modules in GROUPS.items():
                dims = SHAPE.group_dims(group)
                widened = torch.zeros(dims.d_out + len(modules) * 64, dims.d_in)
                widened[: dims.d_out] = rand(*dims) * dims.d_in**-0.5
                self.base[layer, group] = widened
        joint_basis = self.bank.joint
        if joint_basis is not None:

            def widen(columns) -> None:  # type: ignore[no-untyped-def]
                for (layer, group), widened in self.base.items():
                    n, modules = SHAPE.group_dims(group).d_out, len(GROUPS[group])
                    rows = joint_basis.widened_rows(layer, group, widened[:n], columns)
                    widened[n + modules * columns.first :][: len(rows)] = rows

            joint_basis.watch(widen)
        for basis in BASES.values():
            self.bank.add_basis(basis)
        self.tables = StepTables(self.bank, 2048)

    def add(self, weights: AdapterWeights) -> RowAdapter:
        packed = pack_adapter(weights, SHAPE, f"digest-{self.next_unit}", torch.float32)
        return self.load(packed, [Term(weights)])

    def load(self, packed: PackedAdapter, terms: Terms) -> RowAdapter:
        """``terms``: what it is the sum of."""
        units = -(-packed.spec.packed_elements // UNIT_ELEMENTS)
        adapter = RowAdapter(packed.spec, Slot(self.next_unit, units))
        self.next_unit += units + 1
        self.bank.load(adapter, packed)
        self.terms[adapter] = terms
        return adapter

    def check(
        self, parts: StepParts, rows: Sequence[tuple[RowAdapter | None, int]], tokens: int
    ) -> None:
        """Every layer and group equals the plain formula of each row alone."""
        rand = random(7)
        step = self.bank.step(rows)
        for (layer, group), widened in self.base.items():
            dims = SHAPE.group_dims(group)
            x = rand(tokens, dims.d_in)
            full = x @ widened.T
            full[:, dims.d_out :][:, len(GROUPS[group]) * 64 :] = float("nan")
            y0 = full[:, : dims.d_out].clone()
            y = full[:, : dims.d_out]
            parts.apply(layer, group, parts.before(layer, group, x), y, early=False)
            if parts.core is not None:
                self.apply_core(parts, layer, group, full)
            reference, used = y0.clone(), sum(n for _, n in rows)
            if step is not None:
                step.apply(layer, group, x[:used], reference[:used])
            start = 0
            for adapter, length in rows:
                part = slice(start, start + length)
                start += length
                if adapter is None or not adapter.spec.packed_elements:
                    assert torch.equal(y[part], y0[part])
                    continue
                inputs = (layer, group, x[part].double(), y0[part].double())
                expected = y0[part].double() + sum(
                    factor * self.expected(weights, *inputs)
                    for weights, factor in self.terms[adapter]
                )
                for actual in (y[part], reference[part]):
                    error = (actual.double() - expected).norm() / expected.norm()
                    assert error < 1e-5, (layer, group, adapter.spec, float(error))
            assert torch.equal(y[start:], y0[start:])

    def expected(
        self, weights: AdapterWeights, layer: int, group: Group, x: Tensor, y0: Tensor
    ) -> Tensor:
        return expected_delta(weights, layer, group, x, y0)

    def apply_core(self, parts: StepParts, layer: int, group: Group, full: Tensor) -> None:
        """What the fused kernels do, token by token, from h in the chunked order."""
        rows, joint = parts.core, self.bank.joint
        assert rows is not None
        assert joint is not None
        modules = GROUPS[group]
        n = SHAPE.group_dims(group).d_out
        basis = joint.rows_of(layer, group)
        tables = (rows.addresses.tolist(), rows.ranks.tolist(), rows.firsts.tolist())
        for t, (address, rank, first) in enumerate(zip(*tables, strict=True)):
            if address < 0:
                continue
            assert first + rank <= rows.columns
            assert rows.columns in (16, 32, 64)
            assert all(value % rows.alignment == 0 for value in (address, rank, first))
            start = 0
            for m, module in enumerate(modules):
                width = SHAPE.dims[module].d_out
                columns = torch.arange(first, first + rank)
                at = n + (columns // BLOCK) * len(modules) * BLOCK + m * BLOCK + columns % BLOCK
                matrix = layer * len(MODULES) + MODULES.index(module)
                r = self.bank.arena[address + matrix * rank * rank :][: rank * rank].view(rank, -1)
                delta = (r @ full[t, at]) @ basis[first : first + rank, start : start + width]
                full[t, start : start + width] += delta
                start += width


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    """Nothing in here changes what others see but adding adapters."""
    return Loaded()


@pytest.fixture(scope="module")
def adapters(loaded: Loaded) -> list[RowAdapter]:
    return [loaded.add(weights) for weights in all_kinds()]


def check_step(loaded: Loaded, rows: Rows, tokens: int) -> ActiveFamilies:
    active = loaded.tables.fill(rows, tokens)
    loaded.check(loaded.tables.parts(active, tokens), rows, tokens)
    return active


@pytest.mark.parametrize("seed", range(4))
def test_a_mixed_step_equals_each_row_alone(
    loaded: Loaded, adapters: list[RowAdapter], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    choices = [*adapters, None, None, None]
    rows = [(choices[draw(len(choices))], 1) for _ in range(40)]
    rows += [(choices[draw(len(choices))], 1 + draw(40)) for _ in range(6)]
    if seed % 2:  # in any order, not only decode rows first
        rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
    total = sum(n for _, n in rows)
    check_step(loaded, rows, total + draw(20))


def test_every_kind_alone(loaded: Loaded, adapters: list[RowAdapter]) -> None:
    for adapter in adapters:
        check_step(loaded, [(adapter, 1), (None, 1), (adapter, 18)], 20)


def test_parts_serve_every_later_fill_of_their_key(
    loaded: Loaded, adapters: list[RowAdapter]
) -> None:
    """As a captured graph does: made once, used after the tables are filled with other rows."""
    by_kind: dict[tuple[str, int], list[RowAdapter]] = {}
    for weights in (
        *(make_weights("core", 8, 800 + s, basis_id="canonical") for s in range(3)),
        *(make_weights("core", 40, 810 + s, basis_id="large") for s in range(3)),
        *(make_weights("fold", 16, 820 + s) for s in range(3)),
        *(make_weights("lora", 16, 830 + s) for s in range(3)),
        *(with_row_scales(make_weights("lora", 15, 840 + s)) for s in range(3)),
        *(with_correction(make_weights("lora", 14, 850 + s), "canonical", 8) for s in range(3)),
    ):
        adapter = loaded.add(weights)
        by_kind.setdefault((weights.family, weights.rank), []).append(adapter)
    parts = None
    for turn in range(3):
        rows: list[tuple[RowAdapter | None, int]] = [(None, 1)] * turn
        for some in by_kind.values():
            rows += [(some[turn], 1), (some[0], 1), (some[0], 1 + 9 * turn)]
        active = loaded.tables.fill(rows, 160)
        parts = parts or loaded.tables.parts(active, 160)
        assert active == ActiveFamilies(16, 8, ("large",), 64, 16, 16, scale=True)
        loaded.check(parts, rows, 160)


def test_a_step_of_base_rows_is_falsy_and_launches_nothing(loaded: Loaded) -> None:
    empty = RowAdapter(AdapterSpec("none", "lora", 0, None, 0), Slot(0, 0))
    for rows in ([], [(None, 1), (None, 7)], [(empty, 4), (None, 1)]):
        active = loaded.tables.fill(rows, 8)
        assert not active
        assert active == ActiveFamilies()
        parts = loaded.tables.parts(active, 8)
        assert parts.core is None
        assert not parts.has_others


@pytest.mark.parametrize("capacity", [4 << 10, 4 << 20])
def test_a_step_that_is_run_to_compile_reads_nothing_beyond_the_arena(capacity: int) -> None:
    """Its tables were never filled."""
    bank = AdapterBank(SHAPE, capacity_bytes=capacity, device=CPU, dtype=torch.float32, joint=False)
    parts = StepTables(bank, 8).parts(ActiveFamilies(fold_rank=16, lora_rank=16, scale=True), 8)
    for group in GROUPS:
        dims = SHAPE.group_dims(group)
        made = parts.before(1, group, torch.ones(8, dims.d_in))
        parts.apply(1, group, made, torch.ones(8, dims.d_out), early=False)


def test_the_key_says_no_more_than_what_is_launched(
    loaded: Loaded, adapters: list[RowAdapter]
) -> None:
    spec = {(a.spec.family, a.spec.basis_id, a.spec.rank): a for a in adapters if not a.spec.extra}
    extra = {a.spec.extra[0]: a for a in adapters if a.spec.extra}

    def key(*kinds: tuple[str, str | None, int]) -> ActiveFamilies:
        return loaded.tables.fill([(spec[kind], 1) for kind in kinds], 4)  # type: ignore[index]

    canonical, small = ("core", "canonical"), ("core", "small")
    assert key((*canonical, 8)) == key((*canonical, 16)) == ActiveFamilies(16, 8)
    assert key((*canonical, 4)) == ActiveFamilies(16, 1)
    assert key((*canonical, 32)) == ActiveFamilies(32, 8)
    assert key((*canonical, 16), (*small, 8)) == ActiveFamilies(64, 8)
    assert key((*canonical, 33)) == ActiveFamilies(0, 1, ("canonical",), 64)
    assert key(("core", "late", 8)) == ActiveFamilies(0, 8, ("late",), 16)
    assert key(("fold", None, 4), ("fold", None, 24)) == ActiveFamilies(fold_rank=32)
    assert key(("lora", None, 64), (*canonical, 8)) == ActiveFamilies(16, 8, lora_rank=64)
    assert len({key((*canonical, 8)), key((*canonical, 16)), key((*canonical, 32))}) == 2

    def key_of(kind: SectionKind, rank: int, basis_id: str | None = None) -> ActiveFamilies:
        return loaded.tables.fill([(extra[Section(kind, rank, 0, basis_id)], 1)], 4)

    assert key_of("core", 16, "canonical") == ActiveFamilies(16, 8, lora_rank=16)
    assert key_of("core", 64, "canonical") == ActiveFamilies(0, 8, ("canonical",), 64, lora_rank=64)
    assert key_of("core", 8, "late") == ActiveFamilies(0, 8, ("late",), 16, lora_rank=16)
    assert key_of("core", 11, "small") == ActiveFamilies(64, 1)  # no low-rank part
    assert key_of("scale", 0) == ActiveFamilies(scale=True)  # the last one added has rank 0


def test_without_a_joint_basis_everything_is_wide() -> None:
    loaded = Loaded(joint=False)
    adapter = loaded.add(make_weights("core", 8, 1, basis_id="canonical"))
    assert loaded.bank.place("canonical") is None
    assert check_step(loaded, [(adapter, 1)], 1) == ActiveFamilies(0, 8, ("canonical",), 16)


def test_equal_rows_are_written_once(
    loaded: Loaded, adapters: list[RowAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = StepTables(loaded.bank, 64)
    sent = []
    for staging in tables._staging:
        monkeypatch.setattr(staging, "send", lambda target, size: sent.append(size))
    rows = [(adapters[0], 1), (None, 1)]
    first = tables.fill(rows, 8)
    assert tables.fill(list(rows), 8) is first
    assert len(sent) == 1
    tables.fill(rows, 16)  # another layout
    tables.fill(rows[::-1], 16)
    tables.fill([(None, 2)], 16)  # nothing to say
    tables.fill(rows[::-1], 16)
    assert len(sent) == 4


def test_a_prompt_step_launches_programs_for_its_rows_only(
    loaded: Loaded, adapters: list[RowAdapter]
) -> None:
    rows = [(a, 33) for a in adapters if a.spec.family != "core" and not a.spec.extra]
    tokens = sum(n for _, n in rows)
    active = loaded.tables.fill(rows, tokens)
    parts = loaded.tables.parts(active, tokens, max_rows=len(rows))
    for part in parts._others:
        assert part._tiles.starts.shape[0] <= tokens // 16 + len(rows)  # type: ignore[attr-defined]
    loaded.check(parts, rows, tokens)


def test_a_batch_of_256_rows_is_planned_in_no_time(loaded: Loaded) -> None:
    specs = [AdapterSpec(f"{i}", "core", 16, "canonical", 14 * 256) for i in range(512)]
    every = [RowAdapter(spec, Slot(4 * i, 4)) for i, spec in enumerate(specs)]
    batches: list[list[tuple[RowAdapter | None, int]]] = [
        [(adapter, 1) for adapter in part] for part in (every[:256], every[256:])
    ]
    best = float("inf")
    for turn in range(20):
        begin = time.perf_counter()
        loaded.tables.fill(batches[turn % 2], 256)
        best = min(best, time.perf_counter() - begin)
    assert best < 3e-3  # 0.3 ms on an idle machine
