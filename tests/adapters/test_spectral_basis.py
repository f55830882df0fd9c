"""The singular vectors of a base: right, everywhere the same; what is on disk is not trusted."""

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shoal.adapters import spectral_basis
from shoal.adapters.basis import compute_basis
from shoal.adapters.formats.container import tensor_chunks, write_atomically
from shoal.adapters.spec import BaseShape, Dims, Target
from shoal.adapters.spectral_basis import SpectralBasis, sigma_probe

SHAPE = BaseShape(
    name="tiny",
    digest="3" * 64,
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


class Base:
    """Random weights, and how often each was asked for."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.asked: list[Target] = []
        self.weights = {
            target: torch.randn(*SHAPE.dims[target.module], generator=generator)
            for target in SHAPE.targets()
        }

    def weight_of(self, target: Target) -> Tensor:
        self.asked.append(target)
        return self.weights[target]


@pytest.fixture
def base() -> Base:
    return Base()


def count_computed(monkeypatch: pytest.MonkeyPatch) -> list[Target]:
    computed: list[Target] = []
    real = spectral_basis.thin_svd

    def counting(weight: Tensor, target: Target) -> spectral_basis.Factors:
        computed.append(target)
        return real(weight, target)

    monkeypatch.setattr(spectral_basis, "thin_svd", counting)
    return computed


@pytest.mark.parametrize("module", ["q_proj", "k_proj", "gate_proj", "down_proj"])
def test_it_is_the_thin_svd(base: Base, tmp_path: Path, module: str) -> None:
    target = Target(1, module)
    u, sigma, v = (
        f.double() for f in SpectralBasis(base.weight_of, SHAPE, tmp_path).factors(target)
    )
    d_out, d_in = SHAPE.dims[module]
    k = min(d_out, d_in)
    assert (u.shape, sigma.shape, v.shape) == ((d_out, k), (k,), (d_in, k))
    assert bool((sigma[:-1] >= sigma[1:]).all())
    eye = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(u.T @ u, eye, rtol=0, atol=1e-6)
    torch.testing.assert_close(v.T @ v, eye, rtol=0, atol=1e-6)
    torch.testing.assert_close(u * sigma @ v.T, base.weights[target].double(), rtol=0, atol=1e-5)


def test_it_continues_the_canonical_basis(base: Base, tmp_path: Path) -> None:
    """Same vectors, same signs: the leading columns are those that LoRA-XS adapters share."""
    canonical = compute_basis(base.weight_of, SHAPE, 8)
    spectral = SpectralBasis(base.weight_of, SHAPE, tmp_path)
    for target in SHAPE.targets():
        leading = spectral.factors(target).u[:, :8]
        torch.testing.assert_close(leading, canonical.factors[target], rtol=0, atol=1e-6)


def test_only_what_is_asked_for_is_computed_and_only_once(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = count_computed(monkeypatch)
    told: list[tuple[int, int]] = []
    one, other = Target(0, "up_proj"), Target(1, "up_proj")
    first = SpectralBasis(base.weight_of, SHAPE, tmp_path, lambda *done: told.append(done))
    first.prepare([one, other])
    first.prepare([one, other])
    assert (computed, told) == ([one, other], [(0, 2), (1, 2), (2, 2)])
    first.sigma(one), first.probe(other), first.factors(one)
    second = SpectralBasis(base.weight_of, SHAPE, tmp_path)
    assert all(map(torch.equal, first.factors(one), second.factors(one)))
    assert torch.equal(first.probe(other), second.probe(other))
    assert computed == [one, other]
    assert second.id == first.id == "svd-" + "3" * 60
    assert len(second.id) <= 64  # what a catalog has room for


def test_small_parts_stay_in_memory(base: Base, tmp_path: Path) -> None:
    spectral = SpectralBasis(base.weight_of, SHAPE, tmp_path)
    target = Target(0, "q_proj")
    spectral.probe(target)
    asked = len(base.asked)
    assert spectral.sigma(target).shape == (26,)
    spectral.probe(target)
    assert len(base.asked) == asked


def damage(path: Path, how: str) -> None:
    with path.open("rb") as file:
        tensors, metadata = spectral_basis.read_tensors(file, path.stat().st_size, path.name)
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-1])
        return
    if how == "sign of one column":
        tensors["U"][:, 3] *= -1
    elif how == "a scaled column":
        tensors["V"][:, 3] *= 1.01
    elif how == "a singular value":
        tensors["S"][0] *= 1.01
    elif how == "order":
        tensors["S"] = tensors["S"].flip(0)
    elif how == "shape":
        tensors["S"] = tensors["S"][:-1]
    elif how == "dtype":
        tensors["U"] = tensors["U"].bfloat16()
    elif how == "another base":
        metadata["base_digest"] = "4" * 64
    elif how == "another target":
        metadata["target"] = "layers.1.up_proj"
    else:
        raise AssertionError(how)
    write_atomically(path, tensor_chunks(tensors, metadata))


@pytest.mark.parametrize(
    "how",
    [
        "cut",
        "sign of one column",
        "a scaled column",
        "a singular value",
        "order",
        "shape",
        "dtype",
        "another base",
        "another target",
    ],
)
def test_a_damaged_file_is_computed_again(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    target = Target(0, "gate_proj")
    good = SpectralBasis(base.weight_of, SHAPE, tmp_path).factors(target)
    (path,) = tmp_path.glob("*/*.safetensors")
    damage(path, how)
    computed = count_computed(monkeypatch)
    again = SpectralBasis(base.weight_of, SHAPE, tmp_path)
    assert all(map(torch.equal, again.factors(target), good))
    assert computed == [target]
    again.factors(target)
    assert computed == [target], "and stored"


def test_other_weights_under_the_same_digest_are_noticed(tmp_path: Path) -> None:
    target = Target(0, "v_proj")
    SpectralBasis(Base(0).weight_of, SHAPE, tmp_path).factors(target)
    other = Base(1)
    found = SpectralBasis(other.weight_of, SHAPE, tmp_path).factors(target)
    back = found.u * found.sigma @ found.v.T
    torch.testing.assert_close(back, other.weights[target], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "weight", [torch.zeros(35, 26), torch.ones(35, 26), 1e-25 * torch.eye(35, 26)]
)
def test_weights_of_any_rank(tmp_path: Path, weight: Tensor) -> None:
    target = Target(0, "up_proj")
    for _ in range(2):  # computed, then read
        u, sigma, v = SpectralBasis(lambda _: weight, SHAPE, tmp_path).factors(target)
        torch.testing.assert_close(u.T @ u, torch.eye(26), rtol=0, atol=1e-5)
        torch.testing.assert_close(u * sigma @ v.T, weight, rtol=1e-5, atol=1e-5 * weight.max())


def test_many_threads_compute_each_target_once(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = count_computed(monkeypatch)
    spectral = SpectralBasis(base.weight_of, SHAPE, tmp_path)
    targets = [Target(0, "q_proj"), Target(0, "k_proj")] * 3
    threads = [threading.Thread(target=spectral.probe, args=(t,)) for t in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(computed) == sorted(set(targets))


def test_probes_of_singular_values_tell_bases_apart(base: Base, tmp_path: Path) -> None:
    spectral = SpectralBasis(base.weight_of, SHAPE, tmp_path)
    target = Target(0, "q_proj")
    sigma = spectral.sigma(target)
    own = sigma_probe(sigma, target)
    assert own.shape == (4,)
    assert torch.equal(own, sigma_probe(sigma, target))
    moved = sigma_probe(sigma * (1 + 0.05 * torch.linspace(-1, 1, 26)), target)
    assert (moved - own).abs().max() > 1e-3 * sigma.norm()
