"""Blends: the served delta is the float64 sum of the parts' own deltas, whatever their families."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters.test_tables import (
    BASES,
    SHAPE,
    Loaded,
    all_kinds,
    check_step,
    make_weights,
    random,
    with_correction,
    with_row_scales,
)
from torch import Tensor

from shoal.adapters import composing
from shoal.adapters.composing import Base, compose
from shoal.adapters.errors import BlendRefused
from shoal.adapters.families import core, spectral
from shoal.adapters.packing import PackedAdapter, make_sum_spec, pack_adapter
from shoal.adapters.spec import GROUPS, Group, RowAdapter, Target
from shoal.adapters.spectral_basis import SpectralBasis
from shoal.adapters.weights import AdapterWeights, Term, Terms

GIGABYTE = 1 << 30


def only(weights: AdapterWeights, layer: int) -> AdapterWeights:
    """What is on one layer of it."""
    kept = [target for target in weights.tensors if target.layer == layer]
    return replace(
        weights,
        tensors={target: weights.tensors[target] for target in kept},
        scales={target: weights.scales[target] for target in kept},
    )


def entries(seed: int, per_row: int, basis_id: str = "svd") -> AdapterWeights:
    """``spectral``: one entry in every row of M (its diagonal), or several anywhere."""
    rng = torch.Generator().manual_seed(seed)
    tensors: dict[Target, tuple[Tensor, ...]] = {}
    for target in SHAPE.targets():
        if target.module == "k_proj" and per_row == 1:
            continue
        k = min(SHAPE.dims[target.module])
        places = torch.arange(k) * (k + 1)
        if per_row > 1:
            places = torch.randperm(k * k, generator=rng)[: per_row * k].sort().values
        rows, columns = (places // k).int(), (places % k).int()
        tensors[target] = (rows, columns, torch.randn(len(places), generator=rng))
    return AdapterWeights("svft", "spectral", tensors, dict.fromkeys(tensors, 0.5), basis_id)


KINDS: dict[str, AdapterWeights] = {
    "core-4": make_weights("core", 4, 1, basis_id="canonical"),
    "core-16": make_weights("core", 16, 2, basis_id="canonical", skip="v_proj"),
    "core-small": make_weights("core", 11, 3, basis_id="small"),
    "core-late": only(make_weights("core", 8, 4, basis_id="late"), 1),
    "core-large": make_weights("core", 40, 5, basis_id="large", skip="q_proj"),
    "fold-16": make_weights("fold", 16, 6),
    "fold-24": make_weights("fold", 24, 7, skip="gate_proj"),
    "fold-7": only(make_weights("fold", 7, 8), 0),
    "lora-5": make_weights("lora", 5, 9),
    "lora-12": make_weights("lora", 12, 10, skip="k_proj"),
    "lora-0": make_weights("lora", 0, 11),
    "pissa": with_correction(make_weights("lora", 3, 12), "canonical", 3, 5),
    "milora": with_correction(make_weights("lora", 6, 13, skip="o_proj"), "second", 6),
    "dora": with_row_scales(make_weights("lora", 4, 14)),
    "dora-some": with_row_scales(make_weights("lora", 2, 15, skip="up_proj"), "v_proj", "o_proj"),
    "svf": entries(16, 1),
    "svft": entries(17, 3),
}


class World(Loaded):
    """A bank with blends, and the base they are composed on."""

    def __init__(self, folder: Path, *, joint: bool) -> None:
        super().__init__(joint=joint, capacity_bytes=192 << 20)
        self.asked: list[Target] = []
        self.vectors = SpectralBasis(self.weight_of, SHAPE, folder)
        self.bank.add_spectral(self.vectors, SHAPE.targets())
        self.svd = {target: self.vectors.factors(target) for target in SHAPE.targets()}

    def weight_of(self, target: Target) -> Tensor:
        self.asked.append(target)
        for group, modules in GROUPS.items():
            if target.module in modules:
                before = modules[: modules.index(target.module)]
                first = sum(SHAPE.dims[module].d_out for module in before)
                rows = self.base[target.layer, group][first:]
                return rows[: SHAPE.dims[target.module].d_out]
        raise AssertionError(target)

    def expected(
        self, weights: AdapterWeights, layer: int, group: Group, x: Tensor, y0: Tensor
    ) -> Tensor:
        if weights.family != "spectral":
            return super().expected(weights, layer, group, x, y0)
        delta, start = torch.zeros_like(y0), 0
        for module in GROUPS[group]:
            outputs = slice(start, start + SHAPE.dims[module].d_out)
            start = outputs.stop
            target = Target(layer, module)
            if target in weights.tensors:
                rows, columns, values = weights.tensors[target]
                u, _, v = (part.double() for part in self.svd[target])
                m = torch.zeros(u.shape[1], v.shape[1], dtype=torch.float64)
                m[rows.long(), columns.long()] = values.double()
                delta[:, outputs] = weights.scales[target] * x @ v @ m.T @ u.T
        return delta

    def compose(self, terms: Terms, **change: Any) -> PackedAdapter:
        options = {"dtype": torch.float32, "max_bytes": GIGABYTE, **change}
        names = [f"n{i}@1" for i in range(len(terms))]
        base = Base(SHAPE, self.weight_of, BASES.__getitem__)
        return compose(terms, names, f"blend-{self.next_unit}", base, **options)

    def blend(self, *parts: tuple[str, float]) -> RowAdapter:
        terms = [Term(KINDS[kind], factor) for kind, factor in parts]
        return self.load(self.compose(terms), terms)


@pytest.fixture(scope="module", params=[True, False], ids=["joint", "wide"])
def world(request: Any, tmp_path_factory: Any) -> World:
    """On the joint basis the canonical, small and second bases have columns; else none does."""
    return World(tmp_path_factory.mktemp("vectors"), joint=request.param)


# ----------------------------------------------------------------------------------- what is served


def test_every_pair_is_the_sum_of_its_deltas_in_one_mixed_step(world: World) -> None:
    rng = random(1)
    pairs = list(itertools.combinations_with_replacement(KINDS, 2))
    rows: list[tuple[RowAdapter | None, int]] = [(None, 2)]
    for one, other in pairs:
        factors = rng(2).tolist()
        # Neighbours that must not see each other: a blend, and plain adapters between blends.
        rows.append((world.blend((one, factors[0]), (other, factors[1])), 1 + len(rows) % 3))
    plain = [world.add(weights) for weights in all_kinds()[::4]]
    for at, adapter in enumerate(plain):
        rows.insert(at * len(rows) // len(plain), (adapter, 1))
    check_step(world, rows, sum(n for _, n in rows) + 3)


@pytest.mark.parametrize("seed", range(3))
def test_sums_of_up_to_eight(world: World, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows: list[tuple[RowAdapter | None, int]] = []
    for size in (1, 3, 5, 8):
        chosen = torch.randint(len(KINDS), (size,), generator=generator).tolist()
        factors = torch.randn(size, generator=generator).tolist()
        parts = [(list(KINDS)[i], factor) for i, factor in zip(chosen, factors, strict=True)]
        rows.append((world.blend(*parts), 4))
    rows.append((None, 1))
    check_step(world, rows, 17)


# ------------------------------------------------------------------------------ what lies in a bank


@pytest.mark.parametrize(
    ("parts", "sections"),
    [
        (["core-4", "core-16"], [("core", 16, "canonical")]),
        (["core-4", "core-small"], [("core", 11, "small"), ("lora", 4, None)]),
        (["core-4", "core-16", "core-late"], [("core", 16, "canonical"), ("lora", 8, None)]),
        (["core-4", "pissa"], [("core", 5, "canonical"), ("lora", 3, None)]),
        (["pissa", "milora"], [("core", 6, "second"), ("lora", 14, None)]),
        (["core-4", "dora"], [("scale", 0, None), ("lora", 8, None)]),
        (["dora", "dora-some"], [("scale", 0, None), ("lora", 6, None)]),
        (["fold-16", "fold-24"], [("fold", 48, None)]),
        (["fold-16", "fold-7"], [("lora", 23, None)]),
        (["fold-16", "lora-5"], [("fold", 16, None), ("lora", 5, None)]),
        (["lora-5", "lora-12", "lora-0"], [("lora", 17, None)]),
        (["svf", "svf"], [("spectral", 78, "svd")]),
        (
            ["svf", "core-4", "lora-5", "fold-7"],
            [
                ("core", 4, "canonical"),
                ("fold", 7, None),
                ("lora", 5, None),
                ("spectral", 78, "svd"),
            ],
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value[0], str) else "",
)
def test_a_sum_takes_the_sections_it_needs(
    world: World, parts: list[str], sections: list[tuple[str, int, str | None]]
) -> None:
    spec = world.compose([Term(KINDS[kind], 0.5) for kind in parts]).spec
    assert [(s.kind, s.rank, s.basis_id) for s in spec.sections] == sections
    assert (spec.family, spec.rank, spec.basis_id) == sections[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_rounded_once(world: World, dtype: torch.dtype) -> None:
    def draw(seed: int, *size: int) -> Tensor:
        return random(seed)(*size).to(torch.bfloat16)

    target, d_out = Target(1, "k_proj"), SHAPE.dims["k_proj"].d_out
    parts: dict[str, tuple[Sequence[Tensor], ...]] = {
        "core": ([draw(1, 4, 4)], [draw(2, 4, 4)]),
        "fold": ([draw(3, 4, d_out)], [draw(4, 4, d_out)]),
    }
    for family, (one, other) in parts.items():
        terms = [
            Term(
                AdapterWeights(
                    "x",
                    family,  # type: ignore[arg-type]
                    {target: tuple(tensors)},
                    {target: 1 / 3},
                    "canonical" if family == "core" else None,
                ),
                factor,
            )
            for tensors, factor in ((one, 0.7), (other, -0.3))
        ]
        packed = world.compose(terms, dtype=dtype)
        wanted = 0.7 / 3 * one[0].double() - 0.3 / 3 * other[0].double()
        own = packed.data[packed.data != 0]
        assert own.dtype == dtype
        assert torch.equal(own, wanted.flatten().to(dtype))


def test_one_adapter_is_scaled_and_no_larger(world: World) -> None:
    for kind, weights in KINDS.items():
        alone = pack_adapter(weights, SHAPE, "d", torch.float32)
        packed = world.compose([Term(weights, -2.0)])
        if kind not in ("pissa", "milora"):  # whose minus identity is a matrix like any other
            assert replace(packed.spec, digest="d") == alone.spec, kind
        same = world.compose([Term(weights)])
        assert torch.equal(same.data, alone.data), kind


def test_the_base_is_asked_only_for_what_becomes_lora(world: World) -> None:
    world.asked.clear()
    world.compose([Term(KINDS[k]) for k in ("core-4", "core-16", "fold-7", "lora-5", "svf")])
    assert world.asked == []
    world.compose([Term(KINDS["core-large"]), Term(KINDS["core-late"])])
    assert world.asked == list(KINDS["core-late"].tensors)


def test_a_basis_is_multiplied_out_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rand = random(5)
    r, b, w = rand(3, 3), torch.linalg.qr(rand(50, 4))[0], rand(50, 7)
    monkeypatch.setattr(core, "CHUNK_ROWS", 8)
    a, own = core.factors(r, b, w)
    assert torch.equal(own, b[:, :3])
    torch.testing.assert_close(a, r.double() @ b[:, :3].double().T @ w.double())


# ------------------------------------------------------------------------------------- refusals


@pytest.fixture
def nothing_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("made before it was refused")

    monkeypatch.setattr(composing, "pack_sum", fail)
    monkeypatch.setattr(composing.core, "factors", fail)
    monkeypatch.setattr(composing.fold, "factors", fail)


@pytest.mark.usefixtures("nothing_is_made")
def test_what_exceeds_the_bank_is_refused_before_it_is_made(world: World) -> None:
    terms = [Term(KINDS[kind]) for kind in ("core-4", "core-large", "fold-16", "lora-5")]
    size = (
        4
        * make_sum_spec(
            [
                *(Term(KINDS[kind]) for kind in ("core-large", "fold-16")),
                Term(make_weights("lora", 9, 1)),
            ],
            SHAPE,
            "",
        ).packed_elements
    )
    with pytest.raises(BlendRefused, match=r"core of rank 40, fold of rank 16, lora of rank 9"):
        world.compose(terms, max_bytes=size - 1)
    with pytest.raises(BlendRefused, match=r"'n1@1' is the largest"):
        world.compose(terms, max_bytes=size - 1)
    with pytest.raises(AssertionError, match="made before"):
        world.compose(terms, max_bytes=size)


@pytest.mark.usefixtures("nothing_is_made")
def test_factors_of_too_high_a_rank_are_refused(world: World) -> None:
    terms = [Term(make_weights("lora", rank, rank)) for rank in (400, 600, 25)]
    with pytest.raises(BlendRefused, match=r"rank 1025 together, at most 1024 .*'n1@1'"):
        world.compose(terms)
    with pytest.raises(AssertionError, match="made before"):
        world.compose(terms[:2])


@pytest.mark.usefixtures("nothing_is_made")
def test_too_many_entries_are_refused(world: World) -> None:
    most = spectral.ENTRIES_PER_COMPONENT
    terms = [Term(entries(1, most)), Term(entries(2, most - 1))]
    with pytest.raises(BlendRefused, match=r"singular vectors of layers\.0\.q_proj, at most"):
        world.compose(terms)
    with pytest.raises(AssertionError, match="made before"):
        world.compose([terms[0], terms[0]])


@pytest.mark.parametrize("kind", ["core-4", "fold-16", "lora-5", "dora", "svf"])
def test_values_beyond_the_dtype_are_refused(world: World, kind: str) -> None:
    weights = KINDS[kind]
    large = replace(weights, scales=dict.fromkeys(weights.scales, 6e4))
    with pytest.raises(BlendRefused, match=r"n0@1, n1@1 .*overflow torch\.float16"):
        world.compose([Term(large, 50.0), Term(large, 50.0)], dtype=torch.float16)
    with pytest.raises(BlendRefused, match="overflow"):
        world.compose([Term(replace(large, scales=dict.fromkeys(large.scales, 1e308)), 100.0)])
