"""The joint basis: who gets which columns, and in which order the widened rows lie."""

import threading
from collections.abc import Iterator

import pytest
import torch

from shoal.adapters.bank import AdapterBank
from shoal.adapters.basis import Basis
from shoal.adapters.families.joint_basis import BLOCK, COLUMNS, Columns, JointBasis
from shoal.adapters.spec import GROUPS, BaseShape, Dims, Target

SHAPE = BaseShape(
    name="tiny",
    digest="0" * 64,
    num_layers=2,
    dims={
        "q_proj": Dims(80, 72),
        "k_proj": Dims(72, 72),
        "v_proj": Dims(72, 72),
        "o_proj": Dims(72, 80),
        "gate_proj": Dims(90, 72),
        "up_proj": Dims(90, 72),
        "down_proj": Dims(72, 90),
    },
)
CPU = torch.device("cpu")


def make_basis(
    name: str, rank: int, *, canonical: bool = False, modules: tuple[str, ...] = tuple(SHAPE.dims)
) -> Basis:
    generator = torch.Generator().manual_seed(len(name) + rank)
    factors = {
        target: torch.randn(SHAPE.dims[target.module].d_out, rank, generator=generator)
        for target in SHAPE.targets()
        if target.module in modules
    }
    return Basis(name, rank, factors, "canonical" if canonical else "uploaded")


def make_joint() -> JointBasis:
    return JointBasis(SHAPE, CPU, torch.float32)


def test_columns_are_given_in_blocks_first_come_first_served() -> None:
    joint = make_joint()
    assert joint.place("never added") is None
    assert joint.place(None) is None
    assert joint.add(make_basis("first", 5)) == Columns(32, 16)  # the front is the canonical one's
    assert joint.add(make_basis("canonical", 64, canonical=True)) == Columns(0, 32)
    assert joint.add(make_basis("too large", 17)) is None
    assert joint.add(make_basis("second", 16)) == Columns(48, 16)
    assert joint.add(make_basis("too late", 1)) is None
    assert joint.add(make_basis("first", 5)) == Columns(32, 16)
    names = ("canonical", "first", "second", "too large", "too late")
    places = [joint.place(name) for name in names]
    assert places == [Columns(0, 32), Columns(32, 16), Columns(48, 16), None, None]


def test_a_basis_that_would_be_cut_gets_no_columns() -> None:
    """Only the canonical one is nested: of another, the leading columns are another basis."""
    joint = make_joint()
    assert joint.add(make_basis("uploaded", 33)) is None
    assert joint.add(make_basis("uploaded too", 32)) == Columns(32, 32)


def test_rows_hold_the_bases_side_by_side_and_zeros() -> None:
    joint = make_joint()
    canonical = make_basis("canonical", 40, canonical=True)
    partial = make_basis("partial", 3, modules=("k_proj", "down_proj"))
    joint.add(canonical)
    joint.add(partial)
    rows = joint.rows_of(1, "qkv")
    assert rows.shape == (COLUMNS, 80 + 72 + 72)
    assert rows is joint.rows_of(1, "qkv")
    assert torch.equal(rows[:32, :80], canonical.factors[Target(1, "q_proj")].T[:32])
    assert torch.equal(rows[:32, 152:], canonical.factors[Target(1, "v_proj")].T[:32])
    expected = torch.zeros(32, 224)
    expected[:3, 80:152] = partial.factors[Target(1, "k_proj")].T
    assert torch.equal(rows[32:], expected)


@pytest.mark.parametrize("columns", [None, Columns(0, 32), Columns(32, 16), Columns(48, 16)])
def test_widened_rows_lie_by_block_then_module(columns: Columns | None) -> None:
    """Written where they belong, the GEMM's output holds h at the documented places."""
    joint = make_joint()
    joint.add(make_basis("canonical", 32, canonical=True))
    joint.add(make_basis("first", 16))
    joint.add(make_basis("second", 9))
    first, size = columns or Columns(0, 64)
    for group, modules in GROUPS.items():
        dims = SHAPE.group_dims(group)
        weight = torch.randn(*dims)
        widened = torch.zeros(dims.d_out + len(modules) * COLUMNS, dims.d_in)
        widened[: dims.d_out] = weight
        rows = joint.widened_rows(0, group, weight, columns)
        assert rows.shape == (len(modules) * size, dims.d_in)
        widened[dims.d_out + len(modules) * first :][: len(rows)] = rows
        x = torch.randn(3, dims.d_in)
        y = x @ widened.T
        start = 0
        for m, module in enumerate(modules):
            end = start + SHAPE.dims[module].d_out
            basis = joint.rows_of(0, group)[:, start:end]
            h = y[:, start:end] @ basis.T
            for j in range(first, first + size):
                place = dims.d_out + (j // BLOCK) * len(modules) * BLOCK + m * BLOCK + j % BLOCK
                torch.testing.assert_close(y[:, place], h[:, j], rtol=1e-3, atol=1e-3)
            start = end


def test_sums_of_widened_rows_are_float32() -> None:
    """Ten thousand terms in bfloat16 would stop growing at 256."""
    shape = BaseShape("long", "0" * 64, 1, {**SHAPE.dims, "o_proj": Dims(10_000, 80)})
    joint = JointBasis(shape, CPU, torch.bfloat16)
    ones = torch.ones(10_000, 1)
    joint.add(Basis("ones", 1, {Target(0, "o_proj"): ones}, "uploaded"))
    weight = torch.ones(10_000, 80, dtype=torch.bfloat16)
    rows = joint.widened_rows(0, "o", weight, Columns(32, 16))
    assert rows.dtype == torch.bfloat16
    assert (rows[0].float() - 10_000).abs().max() < 40


def test_watchers_hear_of_columns_old_and_new_before_the_basis_is_used() -> None:
    joint = make_joint()
    joint.add(make_basis("canonical", 64, canonical=True))
    heard: list[tuple[Columns, bool]] = []
    joint.watch(lambda columns: heard.append((columns, joint.place("late") is None)))
    joint.add(make_basis("late", 4))
    joint.add(make_basis("late", 4))
    joint.add(make_basis("no room", 20))
    assert heard == [(Columns(0, 32), True), (Columns(32, 16), True)]


def test_columns_whose_widening_failed_are_free_again() -> None:
    joint = make_joint()
    attempts: Iterator[bool] = iter([False, True])

    def widen(columns: Columns) -> None:
        if not next(attempts):
            raise RuntimeError("no memory")

    joint.watch(widen)
    with pytest.raises(RuntimeError, match="no memory"):
        joint.add(make_basis("unlucky", 16))
    assert joint.place("unlucky") is None
    assert joint.add(make_basis("partial", 2, modules=("q_proj",))) == Columns(32, 16)
    assert not joint.rows_of(0, "down").any()
    assert not joint.rows_of(0, "qkv")[:, 80:].any()


def test_bases_added_at_once_never_share_columns() -> None:
    joint = make_joint()
    bases = [make_basis(f"basis {i}", 12) for i in range(6)]
    threads = [threading.Thread(target=joint.add, args=(basis,)) for basis in bases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    places = [joint.place(basis.id) for basis in bases]
    assert sorted(place.first for place in places if place) == [32, 48]


def test_a_bank_says_where_its_bases_are() -> None:
    bank = AdapterBank(SHAPE, capacity_bytes=4096, device=CPU, dtype=torch.float32, joint=True)
    bank.add_basis(make_basis("canonical", 40, canonical=True))
    assert bank.place("canonical") == Columns(0, 32)
    # Whole, for adapters whose rank exceeds the columns.
    rows = bank.core_basis("canonical").rows(0, "o_proj", 40)
    assert rows is not None
    assert rows.shape == (40, 72)
    with pytest.raises(AssertionError, match="has not been added"):
        bank.place("unknown")
