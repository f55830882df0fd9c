"""SVF files against the equations of Transformer², on a decomposition of the test's own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.adapters.spectral_world import MLP, Array, World, assert_close, key, targets
from torch import Tensor

from shoal.adapters.errors import AdapterRejected, AdapterTooLarge
from shoal.adapters.formats import spectral_files
from shoal.adapters.formats.writing import write_svf
from shoal.adapters.record import from_record, to_record
from shoal.adapters.spec import Target

DOWN = Target(1, "down_proj")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def vectors(
    world: World, *modules: str, dtype: torch.dtype = torch.float32, seed: int = 1
) -> dict[Target, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        target: torch.randn(world.sizes(target)[2], generator=generator).to(dtype)
        for target in targets(*modules)
    }


def oracle(w: Array, z: Array, *, renormalise: bool = True) -> Array:
    """W' = U diag(σ z) Vᵀ · Σσ / Σ(σ z)."""
    u, sigma, vt = np.linalg.svd(w, full_matrices=False)
    c = sigma.sum() / (sigma * z).sum() if renormalise else 1.0
    return c * (u * (sigma * z)) @ vt


def sigmoid(p: Array) -> Array:
    return 1 / (1 + np.exp(-p))


@pytest.mark.parametrize("max_mult", [1.0, 2.0])
@pytest.mark.parametrize("renormalise", [True, False])
def test_logits(world: World, max_mult: float, renormalise: bool) -> None:
    given = vectors(world)
    settings = {"max_mult": max_mult, "renormalise": renormalise}
    write_svf(world.folder / "out", given, basis=world.basis, settings=settings)
    weights = world.read(world.folder / "out")
    assert (weights.format, weights.family, weights.basis_id) == ("svf", "spectral", world.basis.id)
    assert set(weights.tensors) == set(given)
    for target, p in given.items():
        z = max_mult * sigmoid(np.asarray(p.double()))
        want = oracle(world.w(target), z, renormalise=renormalise)
        assert_close(world.merged(weights, target), want)


def test_bfloat16_vectors_are_squashed_as_in_training(world: World) -> None:
    """Rounded sigmoids, by hand: to 8 bits of mantissa, ties to even."""
    given = vectors(world, *MLP, dtype=torch.bfloat16)
    write_svf(world.folder / "out", given, basis=world.basis)
    weights = world.read(world.folder / "out")
    for target, p in given.items():
        exact = sigmoid(np.asarray(p.double()))
        unit = 2.0 ** (np.floor(np.log2(exact)) - 7)
        rounded = np.round(exact / unit) * unit
        assert not np.allclose(rounded, exact, rtol=1e-4, atol=0)
        assert_close(world.merged(weights, target), oracle(world.w(target), rounded))


def test_a_combination_of_experts_is_used_as_it_is(world: World) -> None:
    """The authors combine logits and leave the sigmoid out; entries may be negative or zero."""
    experts = [vectors(world, *MLP, seed=seed) for seed in (1, 2)]
    combined = {t: 0.7 * experts[0][t] + 0.4 * experts[1][t] for t in experts[0]}
    combined[DOWN][3] = 0
    write_svf(world.folder / "out", combined, basis=world.basis, settings={"vector": "z"})
    weights = world.read(world.folder / "out")
    for target, z in combined.items():
        want = oracle(world.w(target), np.asarray(z.double()))
        assert_close(world.merged(weights, target), want)


@pytest.mark.parametrize("value", [-3.0, 0.0, 5.0])
def test_constant_logits_change_nothing(world: World, value: float) -> None:
    given = {target: torch.full_like(p, value) for target, p in vectors(world).items()}
    write_svf(world.folder / "out", given, basis=world.basis, settings={"max_mult": 3.0})
    weights = world.read(world.folder / "out")
    for target in given:
        assert_close(world.merged(weights, target), world.w(target), 1e-7)


def test_the_rest_of_the_base_stays(world: World) -> None:
    given = {DOWN: vectors(world)[DOWN]}
    write_svf(world.folder / "out", given, basis=world.basis)
    weights = world.read(world.folder / "out")
    assert set(weights.tensors) == {DOWN}
    assert weights.rank == 15


def test_what_is_written_survives_the_record(world: World) -> None:
    write_svf(world.folder / "out", vectors(world, *MLP), basis=world.basis)
    record = to_record(world.read(world.folder / "out"))
    assert to_record(from_record(record, world.shape)) == record


def test_a_weight_of_zeros_stays_one(world: World) -> None:
    world.weights[DOWN] = torch.zeros_like(world.weights[DOWN])
    write_svf(world.folder / "out", {DOWN: torch.randn(15)}, basis=world.basis)
    weights = world.read(world.folder / "out")
    assert bool((weights.tensors[DOWN][2] == 0).all())


# ------------------------------------------------------------------------------ whose vectors


def by_hand(world: World, probe: Tensor | None, basis: object) -> Path:
    tensors = {key(DOWN, "svf_vector"): vectors(world)[DOWN]}
    if probe is not None:
        tensors[key(DOWN, "svd_probe")] = probe
    return world.save({"peft_type": "SVF", "basis": basis}, tensors)


def good_probe(world: World) -> Tensor:
    write_svf(world.folder / "probe", {DOWN: torch.zeros(15)}, basis=world.basis)
    from safetensors.torch import load_file

    return load_file(world.folder / "probe" / "adapter_model.safetensors")[key(DOWN, "svd_probe")]


def test_an_id_or_a_probe_says_which_base(world: World) -> None:
    want = to_record(world.read(by_hand(world, good_probe(world), {"id": world.basis.id})))
    assert to_record(world.read(by_hand(world, None, {"id": world.basis.id}))) == want
    assert to_record(world.read(by_hand(world, good_probe(world), None))) == want
    # A copy of the base with other files has another digest; its singular values are the same.
    assert to_record(world.read(by_hand(world, good_probe(world), {"id": "svd-other"}))) == want


def test_nothing_is_guessed(world: World, tmp_path: Path) -> None:
    for basis in (None, {"id": "svd-other"}):
        with pytest.raises(
            AdapterRejected, match=r"down_proj\.svd_probe: is missing: nothing says"
        ):
            world.read(by_hand(world, None, basis))
    (tmp_path / "other").mkdir()
    other = World(tmp_path / "other", seed=1)
    for basis in (None, {"id": world.basis.id}):
        with pytest.raises(
            AdapterRejected, match=r"down_proj\.svd_probe: differs by .* another base"
        ):
            world.read(by_hand(world, good_probe(other), basis))
    with pytest.raises(AdapterRejected, match=r"svd_probe: shape \[5\] must be \[4\]"):
        world.read(by_hand(world, torch.zeros(5), None))


@pytest.mark.parametrize("basis", ["svd", {}, {"id": 3}, []])
def test_a_malformed_basis_field(world: World, basis: object) -> None:
    with pytest.raises(AdapterRejected, match="basis: must be an object with the string id"):
        world.read(by_hand(world, good_probe(world), basis))


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vector": "raw"}, "vector: must be logits or z"),
        ({"vector": "z", "max_mult": 2}, "max_mult: belongs to logits; must be 1 with z"),
        ({"max_mult": 0}, "max_mult: must be positive"),
        ({"max_mult": "1"}, "max_mult: must be a finite number"),
        ({"renormalise": 1}, "renormalise: must be true or false"),
        ({"bias": "all"}, "bias: trained biases are not served"),
        ({"peft_type": "SVFT"}, "is SVFT, but the tensors are those of svf; must be SVF"),
        ({"base_correction": {"method": "pissa"}}, "base_correction"),
    ],
)
def test_bad_fields_are_named(world: World, changes: dict[str, Any], message: str) -> None:
    config = {"peft_type": "SVF", "basis": {"id": world.basis.id}} | changes
    with pytest.raises(AdapterRejected, match=message):
        world.read(world.save(config, {key(DOWN, "svf_vector"): torch.ones(15)}))


@pytest.mark.parametrize(
    ("kind", "tensor", "message"),
    [
        ("svf_vector", torch.ones(21), r"svf_vector: shape \[21\] must be \[15\]"),
        ("svf_vector", torch.ones(15, 1), r"svf_vector: shape \[15, 1\] must be \[15\]"),
        ("svf_vector", torch.ones(15).int(), "svf_vector: is torch.int32, must hold floating"),
        ("svf_vector", torch.zeros(15), r"svf_vector: Σ\(σ z\) is 0, by which renormalising"),
        ("svf_vector", torch.full((15,), float("nan")), "every value must be finite"),
        ("bias", torch.ones(15), "bias: biases are not served"),
        ("lora_A", torch.ones(2, 21), "lora_A: is not a tensor of a svf adapter"),
    ],
)
def test_bad_tensors_are_named(world: World, kind: str, tensor: Tensor, message: str) -> None:
    config = {"peft_type": "SVF", "basis": {"id": world.basis.id}, "vector": "z"}
    given = {key(DOWN, "svf_vector"): torch.ones(15)} | {key(DOWN, kind): tensor}
    with pytest.raises(AdapterRejected, match=message):
        world.read(world.save(config, given))


def test_values_that_overflow_are_refused(world: World) -> None:
    config = {"peft_type": "SVF", "basis": {"id": world.basis.id}, "vector": "z"}
    tensors = {key(DOWN, "svf_vector"): torch.full((15,), 3e38)}
    with pytest.raises(AdapterRejected, match=r"down_proj: .* overflows"):
        world.read(world.save(config | {"renormalise": False}, tensors))


def test_a_factor_that_overflows_is_refused(world: World) -> None:
    """Renormalising divides infinity by infinity: NaN, beside finite indices."""
    write_svf(world.folder / "out", vectors(world), basis=world.basis, settings={"max_mult": 1e308})
    with pytest.raises(AdapterRejected, match="times the largest value nan overflows"):
        world.read(world.folder / "out")


def test_limits_come_first(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """In files this small, names take more than what the vectors expand to."""
    monkeypatch.setattr(spectral_files, "ENTRY_BYTES", 1000)
    write_svf(world.folder / "out", vectors(world), basis=world.basis)
    asked: list[Target] = []
    world.basis.prepare = asked.extend  # type: ignore[method-assign]
    with pytest.raises(AdapterTooLarge, match="svf_vector: exceeds 20000 bytes once"):
        world.read(world.folder / "out", max_bytes=20000)
    assert not asked


def test_a_reader_without_singular_vectors_says_so(world: World) -> None:
    write_svf(world.folder / "out", {DOWN: torch.zeros(15)}, basis=world.basis)
    with pytest.raises(AdapterRejected, match="singular vectors, which are not at hand"):
        world.read(world.folder / "out", spectral=False)
