"""The bank: what is loaded where is what rows get, and nothing else."""

import threading
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from shoal.adapters import bank as bank_module
from shoal.adapters.bank import AdapterBank, _Load
from shoal.adapters.basis import Basis
from shoal.adapters.families.core import CoreBasis
from shoal.adapters.packing import PackedAdapter, pack_adapter
from shoal.adapters.spec import (
    GROUPS,
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

SHAPE = BaseShape(
    name="tiny",
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
FAMILIES = ("core", "fold", "lora", "lora, corrected", "lora, scaled")


def make_bank(capacity_bytes: int = 1 << 20) -> AdapterBank:
    bank = AdapterBank(
        SHAPE, capacity_bytes=capacity_bytes, device=torch.device("cpu"), dtype=torch.float32
    )
    bank._records.arena.fill_(float("nan"))
    generator = torch.Generator().manual_seed(0)
    factors = {
        target: torch.randn(SHAPE.dims[target.module].d_out, 8, generator=generator)
        for target in SHAPE.targets()
    }
    bank.add_basis(Basis(id="basis", rank=8, factors=factors, kind="canonical"))
    return bank


def make_adapter(kind: str, seed: int, rank: int = 4) -> PackedAdapter:
    generator = torch.Generator().manual_seed(seed)

    def rand(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    family = cast(Family, kind.partition(",")[0])
    tensors: dict[Target, tuple[Tensor, ...]] = {}
    for target in SHAPE.targets():
        d_out, d_in = SHAPE.dims[target.module]
        if family == "core":
            tensors[target] = (rand(rank, rank),)
        elif family == "fold":
            tensors[target] = (rand(rank, d_out),)
        else:
            tensors[target] = (rand(rank, d_in), rand(d_out, rank))
    scales = dict.fromkeys(tensors, 1.0)
    basis_id = "basis" if family == "core" else None
    weights = AdapterWeights("test", family, tensors, scales, basis_id)
    if kind == "lora, corrected":
        correction = Correction("pissa", "basis", dict.fromkeys(tensors, rank), scales)
        weights = replace(weights, correction=correction)
    elif kind == "lora, scaled":
        g = {target: 1 + rand(SHAPE.dims[target.module].d_out) for target in tensors}
        weights = replace(weights, row_scales=g)
    return pack_adapter(weights, SHAPE, f"{kind}-{seed}", torch.float32)


def place(packed: PackedAdapter, unit: int) -> RowAdapter:
    return RowAdapter(packed.spec, Slot(unit, -(-packed.data.numel() // UNIT_ELEMENTS)))


def outputs(bank: AdapterBank, rows: list[tuple[RowAdapter | None, int]]) -> dict[Group, Tensor]:
    step = bank.step(rows)
    total = sum(n for _, n in rows)
    result = {}
    for group in GROUPS:
        dims = SHAPE.group_dims(group)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(total, dims.d_in, generator=generator)
        result[group] = torch.randn(total, dims.d_out, generator=generator)
        if step is not None:
            step.apply(1, group, x, result[group])
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_a_slot_again_changes_only_its_rows(family: str) -> None:
    bank = make_bank()
    first, second, third = (make_adapter(family, seed) for seed in range(3))
    units = place(first, 0).slot.num_units
    a, b = place(first, 2), place(second, 2 + units)
    bank.load(a, first)
    bank.load(b, second)
    rows: list[tuple[RowAdapter | None, int]] = [(a, 1), (b, 1), (None, 1), (b, 6), (a, 5)]
    before = outputs(bank, rows)
    c = place(third, 2)
    bank.load(c, third)
    after = outputs(bank, [(c if row is a else row, n) for row, n in rows])
    for group in GROUPS:
        assert torch.equal(before[group][1:9], after[group][1:9])
        assert (before[group][[0, 9, 13]] != after[group][[0, 9, 13]]).any(1).all()
        assert after[group].isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_reusing_a_step_never_reuses_what_a_slot_held(family: str) -> None:
    """The same rows after a load must be worked out again, although they compare equal."""
    bank = make_bank()
    first, second = make_adapter(family, 0), make_adapter(family, 1)
    adapter = place(first, 1)
    bank.load(adapter, first)
    # A single record is read in place; several are gathered, and that copy is what could be stale.
    other = place(make_adapter(family, 3), 150)
    bank.load(other, make_adapter(family, 3))
    rows: list[tuple[RowAdapter | None, int]] = [(adapter, 1), (other, 1)]
    before = outputs(bank, rows)
    assert bank.step(rows) is bank.step(rows)
    bank.load(adapter, PackedAdapter(first.spec, second.data))
    assert not torch.equal(before["o"], outputs(bank, rows)["o"])


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_that_holds_no_record_never_matters(family: str) -> None:
    """The arena is NaN but for the records; the last record ends where the arena does."""
    bank = make_bank()
    first, second = make_adapter(family, 0), make_adapter(family, 1)
    units = place(first, 0).slot.num_units
    a, b = place(first, 0), place(second, bank.num_units - units)
    bank.load(a, first)
    bank.load(b, second)
    for value in outputs(bank, [(b, 1), (a, 1), (None, 1), (b, 40)]).values():
        assert value.isfinite().all()


def test_base_rows_keep_their_bits() -> None:
    bank = make_bank()
    unit, rows = 0, []
    for family in FAMILIES:
        packed = make_adapter(family, 0)
        adapter = place(packed, unit)
        unit += adapter.slot.num_units
        bank.load(adapter, packed)
        rows += [(adapter, 1), (None, 1), (adapter, 3), (None, 2)]
    mixed, base = outputs(bank, rows), outputs(bank, [(None, n) for _, n in rows])
    is_base = torch.tensor([row is None for row, n in rows for _ in range(n)])
    for group in GROUPS:
        assert torch.equal(mixed[group][is_base], base[group][is_base])
        assert not torch.equal(mixed[group][~is_base], base[group][~is_base])


def test_a_step_without_adapters_is_none() -> None:
    bank = make_bank()
    empty = pack_adapter(AdapterWeights("x", "lora", {}, {}), SHAPE, "e", torch.float32)
    assert bank.step([]) is None
    assert bank.step([(None, 1), (None, 7)]) is None
    assert bank.step([(RowAdapter(empty.spec, Slot(0, 0)), 4)]) is None


def test_a_basis_is_added_once_and_from_any_thread() -> None:
    bank = make_bank()
    factors = {target: torch.ones(SHAPE.dims[target.module].d_out, 2) for target in SHAPE.targets()}
    basis = Basis(id="other", rank=2, factors=factors, kind="uploaded")
    assert not bank.has_basis("other")
    threads = [threading.Thread(target=bank.add_basis, args=(basis,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bank.has_basis("other")
    kept = bank._bases["other"]
    bank.add_basis(basis)
    assert bank._bases["other"] is kept


def test_a_known_basis_does_not_wait_for_one_that_is_being_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bank = make_bank()
    known, late = (Basis(id=name, rank=2, factors={}, kind="uploaded") for name in ("a", "b"))
    bank.add_basis(known)
    entered, go_on = threading.Event(), threading.Event()

    class Slow(CoreBasis):
        def __init__(self, *args: Any, **options: Any) -> None:
            entered.set()
            assert go_on.wait(20)
            super().__init__(*args, **options)

    monkeypatch.setattr(bank_module, "CoreBasis", Slow)
    writing = threading.Thread(target=bank.add_basis, args=(late,))
    writing.start()
    assert entered.wait(20)
    asking = threading.Thread(target=bank.add_basis, args=(known,), daemon=True)
    asking.start()
    asking.join(5)
    waited = asking.is_alive()
    go_on.set()
    writing.join()
    assert not waited
    assert bank.has_basis("b")


def test_a_basis_may_cover_some_targets_only() -> None:
    bank = make_bank()
    factors = {
        target: torch.ones(SHAPE.dims[target.module].d_out, 4)
        for target in SHAPE.targets()
        if target.module == "v_proj" and target.layer == 1
    }
    bank.add_basis(Basis(id="partial", rank=4, factors=factors, kind="uploaded"))
    target = next(iter(factors))
    weights = AdapterWeights(
        "lora_xs", "core", {target: (torch.ones(4, 4),)}, {target: 1.0}, "partial"
    )
    packed = pack_adapter(weights, SHAPE, "p", torch.float32)
    adapter = place(packed, 0)
    bank.load(adapter, packed)
    changed, base = outputs(bank, [(adapter, 3)]), outputs(bank, [(None, 3)])
    assert torch.equal(changed["qkv"][:, :48], base["qkv"][:, :48])
    assert not torch.equal(changed["qkv"][:, 48:], base["qkv"][:, 48:])
    for group in ("o", "gate_up", "down"):
        assert torch.equal(changed[group], base[group])  # type: ignore[index]


def test_capacity_is_counted_in_units_and_must_hold_one() -> None:
    assert make_bank(3 * 4 * UNIT_ELEMENTS + 5).num_units == 3
    with pytest.raises(ValueError, match="capacity_bytes is 4095"):
        make_bank(4095)


class FakeEvent:
    def __init__(self) -> None:
        self.done = False

    def query(self) -> bool:
        return self.done


def test_a_step_waits_for_the_loads_of_its_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[FakeEvent] = []

    class FakeStream:
        wait_event = staticmethod(waited.append)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream)
    bank = make_bank()
    packed = [make_adapter("core", seed) for seed in range(3)]
    adapters = [place(one, 10 * i) for i, one in enumerate(packed)]
    events = [FakeEvent() for _ in packed]
    for adapter, one, event in zip(adapters, packed, events, strict=True):
        bank._loads.append(_Load(adapter.slot.unit, event, one.data))  # type: ignore[arg-type]
    bank.wait_loads([(adapters[1], 1), (None, 3)])
    assert waited == [events[1]]
    bank.wait_loads()
    assert waited == [events[1], *events]
    events[0].done = events[1].done = True
    bank.wait_loads([(adapters[2], 1)])
    assert waited[-1] is events[2]
    assert [load.done for load in bank._loads] == events[2:], "sources are kept while they are read"
