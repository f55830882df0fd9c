"""The canonical basis: exact, nested, portable; its file and the set of known bases."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shoal.adapters.basis import (
    Basis,
    BasisStore,
    canonical_basis,
    canonical_path,
    compute_basis,
    load_basis,
    make_basis,
    orthonormality_error,
    probe,
    save_basis,
    seeded_columns,
)
from shoal.adapters.errors import AdapterRejected
from shoal.adapters.spec import MODULES, BaseShape, Dims, Target

SHAPE = BaseShape(
    name="tiny",
    digest="d" * 64,
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
Q0 = Target(0, "q_proj")


def weight_of(target: Target) -> Tensor:
    generator = torch.Generator().manual_seed(10 * target.layer + MODULES.index(target.module))
    return torch.randn(SHAPE.dims[target.module], generator=generator)


@pytest.fixture(scope="module")
def basis() -> Basis:
    return compute_basis(weight_of, SHAPE, 24)


def test_columns_are_the_leading_left_singular_vectors(basis: Basis) -> None:
    for target in SHAPE.targets():
        factor = basis.factors[target]
        u, _, _ = torch.linalg.svd(weight_of(target).double())
        assert factor.shape == (SHAPE.dims[target.module].d_out, min(24, *weight_of(target).shape))
        overlap = (factor.double() * u[:, : factor.shape[1]]).sum(0).abs()
        assert torch.allclose(overlap, torch.ones_like(overlap), atol=1e-6)
        assert orthonormality_error(factor) < 1e-5


def test_smaller_rank_is_the_leading_columns_of_a_larger_one(basis: Basis) -> None:
    small = compute_basis(weight_of, SHAPE, 8)
    for target in SHAPE.targets():
        assert torch.equal(small.factors[target], basis.factors[target][:, :8])


def test_signs_and_values_survive_a_rounding_difference_in_the_weights(basis: Basis) -> None:
    again = compute_basis(lambda t: weight_of(t).double() * (1 + 1e-13), SHAPE, 24)
    for target in SHAPE.targets():
        assert torch.allclose(again.factors[target], basis.factors[target], atol=1e-6)


def test_rank_deficient_weights_still_give_an_orthonormal_basis() -> None:
    flat = compute_basis(lambda t: torch.zeros(SHAPE.dims[t.module]), SHAPE, 8)
    thin = compute_basis(lambda t: weight_of(t)[:, :1] @ weight_of(t)[:1], SHAPE, 8)
    for basis in (flat, thin):
        assert all(orthonormality_error(f) < 1e-5 for f in basis.factors.values())


def test_progress_counts_every_target() -> None:
    seen: list[tuple[int, int]] = []
    compute_basis(weight_of, SHAPE, 2, lambda done, total: seen.append((done, total)))
    assert seen == [(n, 14) for n in range(15)]


def test_failure_ends_the_work_and_restores_the_threads() -> None:
    threads = torch.get_num_threads()
    asked: list[Target] = []

    def fails(target: Target) -> Tensor:
        asked.append(target)
        if len(asked) == 4:
            raise RuntimeError("no such weight")
        return weight_of(target)

    with pytest.raises(RuntimeError, match="no such weight"):
        compute_basis(fails, SHAPE, 2)
    assert torch.get_num_threads() == threads


def test_seeded_columns_never_change() -> None:
    # Signs and probes in stored files depend on these numbers.
    drawn = seeded_columns(Target(3, "up_proj"), 3, 2, "probe")
    stream = hashlib.shake_256(b"shoal:probe:1:3:up_proj:1").digest(4)
    assert float(drawn[0, 1]) == (int.from_bytes(stream, "little") + 0.5) / 2**31 - 1
    assert drawn[:, 0].tolist() == pytest.approx(
        [-0.3373541778419167, 0.6128763409797102, -0.5271990497130901], rel=1e-12
    )


def test_probe_of_leading_columns_is_the_leading_rows(basis: Basis) -> None:
    full = probe(basis.factors[Q0], Q0)
    assert full.shape == (24, 4)
    assert torch.allclose(probe(basis.factors[Q0][:, :8], Q0), full[:8], atol=1e-7)


def test_file_round_trip_keeps_id_and_bits(basis: Basis, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "b.safetensors"
    save_basis(basis, path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == basis.id
    again = load_basis(path, SHAPE)
    assert (again.id, again.rank, again.kind) == (basis.id, 24, "canonical")
    assert list(again.factors) == list(SHAPE.targets())
    assert all(torch.equal(again.factors[t], basis.factors[t]) for t in basis.factors)
    assert [file.name for file in path.parent.iterdir()] == ["b.safetensors"]


def test_canonical_is_computed_once_and_again_when_damaged(tmp_path: Path) -> None:
    calls: list[int] = []

    def get() -> Basis:
        return canonical_basis(weight_of, SHAPE, 4, tmp_path, lambda done, total: calls.append(1))

    first = get()
    computed = len(calls)
    assert get().id == first.id
    assert len(calls) == computed
    path = canonical_path(tmp_path, SHAPE, 4)
    path.write_bytes(path.read_bytes()[:-1])
    assert get().id == first.id
    assert len(calls) == 2 * computed


@pytest.mark.parametrize(
    ("factors", "kind", "rule"),
    [
        ({Q0: torch.ones(32, 2)}, "uploaded", "BᵀB"),
        ({Q0: torch.full((32, 2), float("nan"))}, "uploaded", "finite"),
        ({Q0: torch.eye(31)[:, :2]}, "uploaded", "shape"),
        ({Target(0, "k_proj"): torch.eye(16, 17)}, "uploaded", "shape"),
        ({Target(2, "q_proj"): torch.eye(32)[:, :2]}, "uploaded", "layers 0 to 1"),
        ({Target(0, "lm_head"): torch.eye(32)[:, :2]}, "uploaded", r"layers\.<layer>"),
        ({Q0: torch.eye(32)[:, :2]}, "canonical", "must be present"),
    ],
)
def test_unusable_basis_file_names_the_tensor(
    factors: dict[Target, Tensor], kind: str, rule: str, tmp_path: Path
) -> None:
    path = tmp_path / "b.safetensors"
    save_basis(make_basis(factors, kind=kind, base_digest=SHAPE.digest), path)  # type: ignore[arg-type]
    with pytest.raises(AdapterRejected, match=rule):
        load_basis(path, SHAPE)


def test_basis_of_another_base_is_refused(basis: Basis, tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    save_basis(make_basis(basis.factors, kind="canonical", base_digest="e" * 64), path)
    with pytest.raises(AdapterRejected, match="was computed for base"):
        load_basis(path, SHAPE)


def test_any_truncation_or_flipped_byte_is_refused_or_changes_the_id(tmp_path: Path) -> None:
    basis = make_basis({Q0: torch.eye(32)[:, :2]}, kind="uploaded", base_digest="x")
    path = tmp_path / "b.safetensors"
    save_basis(basis, path)
    good = path.read_bytes()
    for position in range(0, len(good), 7):
        for bad in (good[:position], good[:position] + b"\xff" + good[position + 1 :]):
            path.write_bytes(bad)
            try:
                loaded = load_basis(path, SHAPE)
            except AdapterRejected:
                continue
            assert loaded.id != basis.id


def uploaded(seed: int) -> Basis:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.linalg.qr(torch.randn(32, 2, generator=generator)).Q
    return make_basis({Q0: factor}, kind="uploaded", base_digest="x")


def test_store_keeps_bases_across_restarts(tmp_path: Path) -> None:
    store = BasisStore(tmp_path / "bases")
    one, two = uploaded(1), uploaded(2)
    assert store.add(one)
    assert store.add(two)
    assert store.add(one)
    again = BasisStore(tmp_path / "bases")
    assert {basis.id for basis in again.all()} == {one.id, two.id}
    found = again.get(one.id)
    assert found is not None
    assert torch.equal(found.factors[Q0], one.factors[Q0])
    assert again.get("0" * 64) is None


def test_full_store_refuses_and_changes_nothing(basis: Basis, tmp_path: Path) -> None:
    store = BasisStore(tmp_path)
    assert store.add(uploaded(1), limit=1)
    assert not store.add(uploaded(2), limit=1)
    assert store.add(uploaded(1), limit=1)
    assert store.add(basis)
    assert len(list(tmp_path.iterdir())) == len(store.all()) == 2


def test_store_skips_damaged_files_and_leftovers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = BasisStore(tmp_path)
    one, two = uploaded(1), uploaded(2)
    store.add(one)
    (tmp_path / f"{two.id}.safetensors").write_bytes(b"half a fi")
    (tmp_path / ".x.tmp").write_bytes(b"")
    save_basis(two, tmp_path / ("0" * 64 + ".safetensors"))
    assert [basis.id for basis in BasisStore(tmp_path).all()] == [one.id]
    assert "unusable" in caplog.text
    assert "damaged" in caplog.text
