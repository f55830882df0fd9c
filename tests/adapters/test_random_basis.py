"""The basis of random weights: orthonormal, repeatable, and nobody else's."""

from pathlib import Path

import torch

from shoal.adapters.basis import load_basis, orthonormality_error, save_basis
from shoal.adapters.random_basis import random_basis
from shoal.adapters.spec import BaseShape, Dims

CPU = torch.device("cpu")


def shape(digest: str = "0" * 64) -> BaseShape:
    wide = {"q_proj", "o_proj", "up_proj", "gate_proj"}
    modules = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    dims = {m: Dims(48, 32) if m in wide else Dims(12, 48) for m in modules}
    return BaseShape(name="tiny", digest=digest, num_layers=2, dims=dims)


def test_it_is_a_canonical_basis_like_any_other(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    basis = random_basis(shape(), 16, CPU, progress=lambda *at: seen.append(at))
    assert all(orthonormality_error(factor) < 1e-5 for factor in basis.factors.values())
    assert seen[-1] == (14, 14)
    save_basis(basis, tmp_path / "basis.safetensors")
    assert load_basis(tmp_path / "basis.safetensors", shape()).id == basis.id


def test_it_is_the_same_again_and_another_for_other_weights() -> None:
    assert random_basis(shape(), 16, CPU).id == random_basis(shape(), 16, CPU).id
    others = [
        random_basis(shape("1" * 64), 16, CPU),
        random_basis(shape(), 8, CPU),
        random_basis(shape(), 16, CPU, seed=1),
    ]
    assert len({basis.id for basis in (random_basis(shape(), 16, CPU), *others)}) == 4
