"""``spectral`` adapters in the bank: beside the other families, and the vectors they share."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shoal.adapters.bank import AdapterBank
from shoal.adapters.basis import compute_basis
from shoal.adapters.errors import AdapterTooLarge
from shoal.adapters.packing import pack_adapter
from shoal.adapters.spec import (
    GROUPS,
    MODULES,
    UNIT_ELEMENTS,
    BaseShape,
    Dims,
    Group,
    RowAdapter,
    Slot,
    Target,
)
from shoal.adapters.spectral_basis import Factors, SpectralBasis
from shoal.adapters.tables import StepParts, StepTables
from shoal.adapters.weights import AdapterWeights

SHAPE = BaseShape(
    name="tiny",
    digest="5" * 64,
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
Rows = Sequence[tuple[RowAdapter | None, int]]


def weight_of(target: Target) -> Tensor:
    generator = torch.Generator().manual_seed(10 * target.layer + MODULES.index(target.module))
    return torch.randn(*SHAPE.dims[target.module], generator=generator)


Apply = Callable[[int, Group, Tensor, Tensor], None]


def through_tables(parts: StepParts) -> Apply:
    """What ``StepAdapters.apply`` is, of a step's tables."""

    def apply(layer: int, group: Group, x: Tensor, y: Tensor) -> None:
        parts.apply(layer, group, parts.before(layer, group, x), y, early=False)

    return apply


class Step:
    """A bank, what is in it, and what each adapter makes of a weight in float64."""

    def __init__(self, folder: Path, *, spectral_bytes: int | None = None) -> None:
        self.bank = AdapterBank(
            SHAPE,
            capacity_bytes=1 << 20,
            device=torch.device("cpu"),
            dtype=torch.float32,
            spectral_bytes=spectral_bytes,
        )
        self.bank.arena.fill_(float("nan"))
        self.basis = SpectralBasis(weight_of, SHAPE, folder)
        self.deltas: dict[RowAdapter, dict[Target, Tensor]] = {}
        self.next_unit = 1

    def add(self, weights: AdapterWeights, deltas: dict[Target, Tensor]) -> RowAdapter:
        packed = pack_adapter(weights, SHAPE, f"digest-{self.next_unit}", torch.float32)
        units = -(-packed.spec.packed_elements // UNIT_ELEMENTS)
        adapter = RowAdapter(packed.spec, Slot(self.next_unit, units))
        self.next_unit += units + 1
        self.bank.load(adapter, packed)
        self.deltas[adapter] = deltas
        return adapter

    def spectral(self, seed: int, modules: Sequence[str], per_row: int) -> RowAdapter:
        """Random distinct entries; its delta from a singular value decomposition of its own."""
        generator = torch.Generator().manual_seed(seed)
        tensors, deltas = {}, {}
        for target in SHAPE.targets():
            if target.module not in modules:
                continue
            k = min(SHAPE.dims[target.module])
            places = torch.randperm(k * k, generator=generator)[: per_row * k].sort().values
            rows, columns = places // k, places % k
            values = torch.randn(len(places), generator=generator)
            tensors[target] = (rows.int(), columns.int(), values)
            u, _, vt = torch.linalg.svd(weight_of(target).double(), full_matrices=False)
            signs = (self.basis.factors(target).u.double() * u).sum(0).sign()
            m = torch.zeros(k, k, dtype=torch.float64)
            m[rows, columns] = values.double()
            deltas[target] = 0.5 * (u * signs) @ m @ (vt * signs[:, None])
        weights = AdapterWeights(
            "svft", "spectral", tensors, dict.fromkeys(tensors, 0.5), self.basis.id
        )
        self.bank.add_spectral(self.basis, tensors)
        return self.add(weights, deltas)

    def others(self) -> list[RowAdapter]:
        """One of each other family."""
        generator = torch.Generator().manual_seed(99)

        def rand(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator)

        basis = compute_basis(weight_of, SHAPE, 4)
        self.bank.add_basis(basis)
        made = []
        for family in ("core", "fold", "lora"):
            tensors: dict[Target, tuple[Tensor, ...]] = {}
            deltas = {}
            for target in SHAPE.targets():
                d_out, d_in = SHAPE.dims[target.module]
                if family == "core":
                    r, b = rand(4, 4), basis.factors[target].double()
                    tensors[target] = (r,)
                    deltas[target] = b @ r.double() @ b.T @ weight_of(target).double()
                elif family == "fold":
                    d = rand(3, d_out)
                    tensors[target] = (d,)
                    deltas[target] = d.double().T[:, [j % 3 for j in range(d_in)]]
                else:
                    a, b = rand(5, d_in), rand(d_out, 5)
                    tensors[target] = (a, b)
                    deltas[target] = b.double() @ a.double()
            weights = AdapterWeights(
                family,
                family,  # type: ignore[arg-type]
                tensors,
                dict.fromkeys(tensors, 1.0),
                basis.id if family == "core" else None,
            )
            made.append(self.add(weights, deltas))
        return made

    def inputs(self, layer: int, group: Group, rows: Rows) -> tuple[Tensor, Tensor]:
        """x, and the base's own output of it."""
        total = sum(count for _, count in rows)
        x = torch.randn(total, SHAPE.group_dims(group).d_in, generator=torch.manual_seed(layer))
        return x, torch.cat([x @ weight_of(Target(layer, m)).T for m in GROUPS[group]], 1)

    def expected(self, layer: int, group: Group, rows: Rows) -> Tensor:
        """Every row through merged weights, in float64."""
        x, _ = self.inputs(layer, group, rows)
        wanted, start = [], 0
        for adapter, count in rows:
            own = x[start : start + count].double()
            start += count
            merged = []
            for module in GROUPS[group]:
                w = weight_of(Target(layer, module)).double()
                delta = self.deltas[adapter].get(Target(layer, module)) if adapter else None
                merged.append(w if delta is None else w + delta)
            wanted.append(own @ torch.cat(merged).T)
        return torch.cat(wanted)

    def check(self, rows: Rows, *, tables: bool = False) -> None:
        apply: Apply
        if tables:
            tokens = sum(count for _, count in rows)
            made = StepTables(self.bank, tokens)
            apply = through_tables(made.parts(made.fill(rows, tokens), tokens))
        else:
            step = self.bank.step(rows)
            assert step is not None
            apply = step.apply
        for layer in range(SHAPE.num_layers):
            for group in GROUPS:
                x, y0 = self.inputs(layer, group, rows)
                y = y0.clone()
                apply(layer, group, x, y)
                want = self.expected(layer, group, rows)
                atol = 2e-5 * float(want.abs().max())
                torch.testing.assert_close(y.double(), want, rtol=0, atol=atol)
                start = 0
                for adapter, count in rows:
                    if adapter is None:
                        assert torch.equal(y[start : start + count], y0[start : start + count])
                    start += count


@pytest.mark.parametrize("tables", [False, True])
def test_a_batch_that_mixes_all_families(tmp_path: Path, tables: bool) -> None:
    step = Step(tmp_path)
    svf = step.spectral(1, MLP, 1)
    svft = step.spectral(2, MODULES, 5)
    partial = step.spectral(3, ("k_proj",), 2)
    core, fold, lora = step.others()
    step.check(
        [
            *((adapter, 1) for adapter in (svf, core, svft, None, fold, partial, lora, svf)),
            (svft, 7),
            (lora, 3),
            (None, 2),
            (partial, 30),
            (svf, 4),
        ],
        tables=tables,
    )
    step.check([(svf, 1)], tables=tables)
    step.check([(svft, 9)], tables=tables)


def test_tables_follow_the_rows(tmp_path: Path) -> None:
    """The same key for other rows: nothing of the last step may stay."""
    step = Step(tmp_path)
    first, second = step.spectral(1, MODULES, 2), step.spectral(2, MODULES, 3)
    tables = StepTables(step.bank, 8)
    for rows in ([(first, 2), (second, 2)], [(second, 2), (first, 2)], [(None, 3), (first, 1)]):
        active = tables.fill(rows, 4)
        assert active
        assert not active.capturable
        x, y = step.inputs(0, "down", rows)
        through_tables(tables.parts(active, 4))(0, "down", x, y)
        want = step.expected(0, "down", rows)
        torch.testing.assert_close(y.double(), want, rtol=0, atol=2e-5 * float(want.abs().max()))
    assert tables.fill([(None, 4)], 4).capturable


def test_vectors_are_bounded_and_shared(tmp_path: Path) -> None:
    one = 4 * 26 * (35 + 26)
    step = Step(tmp_path, spectral_bytes=2 * one)
    step.spectral(1, ("down_proj",), 1)  # of both layers
    step.spectral(2, ("down_proj",), 3)
    with pytest.raises(AdapterTooLarge, match=r"of 2 modules take .* 0 are left"):
        step.bank.add_spectral(step.basis, [Target(0, "down_proj"), *targets("up_proj")])
    assert Target(0, "up_proj") not in step.bank._singular
    step.bank.add_spectral(step.basis, targets("down_proj"))


def test_vectors_are_there_together_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Step(tmp_path, spectral_bytes=2 * 4 * 26 * (35 + 26))
    first, second = targets("down_proj")
    right = step.basis.factors

    def broken(target: Target) -> Factors:
        # Another thread that asked now would be told that they have arrived.
        assert first not in step.bank._singular
        if target == second:
            raise OSError("disk full")
        return right(target)

    monkeypatch.setattr(step.basis, "factors", broken)
    with pytest.raises(OSError, match="disk full"):
        step.bank.add_spectral(step.basis, [first, second])
    monkeypatch.undo()
    step.bank.add_spectral(step.basis, [first, second])  # and nothing has been counted


def targets(module: str) -> list[Target]:
    return [target for target in SHAPE.targets() if target.module == module]
