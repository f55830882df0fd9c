"""TinyLoRA: a few numbers per group of modules, on fixed random matrices and LoRA-XS's factors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import TinyLoraConfig, get_peft_model

from shoal.adapters.basis import compute_basis
from shoal.adapters.errors import AdapterRejected, AdapterTooLarge
from shoal.adapters.spec import Target

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
TARGETS = ["q_proj", "down_proj"]
Q0 = Target(0, "q_proj")
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


def saved(peft_base: Any, **config: Any) -> Path:
    config = {"r": 3, "u": 4, "target_modules": TARGETS} | config
    return Path(peft_base.save(peft_base.adapted(TinyLoraConfig(**config))))


def with_small_canonical(peft_base: Any) -> None:
    """A canonical basis of fewer columns than the adapters here need."""
    peft_base.canonical = compute_basis(peft_base.weights.__getitem__, peft_base.shape, 2)


def test_lies_in_the_canonical_basis(peft_base: Any) -> None:
    weights = peft_base.read(saved(peft_base))
    assert (weights.format, weights.family) == ("tinylora", "core")
    assert set(weights.scales.values()) == {1.0}
    assert weights.basis_id == peft_base.canonical.id
    assert not peft_base.bases.all()


def test_brings_a_basis_like_lora_xs(peft_base: Any) -> None:
    with_small_canonical(peft_base)
    first = peft_base.read(saved(peft_base), max_bases=1)
    assert {parts[0].shape for parts in first.tensors.values()} == {(3, 3)}
    second = peft_base.read(saved(peft_base, projection_seed=1), max_bases=1)
    assert [basis.id for basis in peft_base.bases.all()] == [first.basis_id]
    assert second.basis_id == first.basis_id
    assert not torch.equal(second.tensors[Q0][0], first.tensors[Q0][0])


def test_same_singular_vectors_are_the_canonical_basis(peft_base: Any) -> None:
    out = saved(peft_base)
    tensors = peft_base.tensors(out)
    for target, path in ((Q0, PREFIX), (Target(1, "down_proj"), None)):
        path = path or "base_model.model.model.layers.1.mlp.down_proj"
        b = peft_base.canonical.factors[target][:, :3] * torch.tensor([1.0, -1.0, 1.0])
        a = b.T @ peft_base.weights[target]
        roots = a.norm(dim=1).sqrt()
        tensors[f"{path}.tinylora_A"] = (a / roots[:, None]).contiguous()
        tensors[f"{path}.tinylora_B"] = (b * roots).contiguous()
    only = {n: t for n, t in tensors.items() if "layers.0.self" in n or "layers.1.mlp" in n}
    vectors = {f"base_model.tinylora_v.{i}": tensors[f"base_model.tinylora_v.{i}"] for i in (0, 1)}
    peft_base.put(out, only | vectors)
    peft_base.edit(
        out, target_modules=["model.layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"]
    )
    weights = peft_base.read(out)
    assert weights.basis_id == peft_base.canonical.id
    v, p = vectors["base_model.tinylora_v.0"].double(), tensors[f"{PREFIX}.tinylora_P"].double()
    r = torch.einsum("i,ijk->jk", v, p)
    x = torch.randn(4, 21)
    a, b = (tensors[f"{PREFIX}.tinylora_{k}"].double() for k in "AB")
    delta = x.double() @ (b @ r @ a).T
    ours = peft_base.output(weights, Q0, x) - x.double() @ peft_base.weights[Q0].double().T
    assert torch.allclose(ours, delta, rtol=1e-4, atol=1e-6)


def test_without_room_for_a_basis_it_is_served_exactly_as_lora(peft_base: Any) -> None:
    with_small_canonical(peft_base)
    model = peft_base.adapted(TinyLoraConfig(r=3, u=4, target_modules=TARGETS))
    weights = peft_base.read(peft_base.save(model), max_bases=0)
    assert weights.family == "lora"
    assert weights.tensors[Q0][0].shape == (3, 21)
    assert peft_base.error(weights, model) < 1e-5
    assert not peft_base.bases.all()


def test_factors_of_a_bfloat16_base_stay_as_they_are(peft_base: Any) -> None:
    """Rounded, they are neither orthonormal nor ``BᵀW``: what was trained is what is served."""
    config = TinyLoraConfig(r=3, u=4, target_modules=TARGETS, save_projection=False)
    model = get_peft_model(peft_base.model().bfloat16(), config)
    for name, parameter in model.named_parameters():
        if "tinylora_v" in name:
            parameter.data = torch.randn_like(parameter)
    out = peft_base.save(model)
    weights = peft_base.read(out, weight_of=lambda t: peft_base.weights[t].bfloat16())
    assert weights.family == "lora"
    module = model.get_base_model().model.layers[0].self_attn.q_proj
    delta = module.get_delta_weight("default")
    a, b = weights.tensors[Q0]
    assert torch.allclose(b.float() @ a, delta.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_are_drawn_bit_for_bit(
    peft_base: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"r": 3, "u": 4, "target_modules": TARGETS, "projection_seed": 9}
    model = get_peft_model(peft_base.model().to(dtype), TinyLoraConfig(**config))
    out = peft_base.save(model)
    saved_tensors = peft_base.tensors(out)
    drawn: list[torch.Tensor] = []
    einsum = torch.einsum

    def seen(equation: str, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        drawn.append(p)
        return einsum(equation, v, p)

    kept = {name: t for name, t in saved_tensors.items() if "tinylora_P" not in name}
    monkeypatch.setattr(torch, "einsum", seen)
    peft_base.read(peft_base.put(out, kept), weight_of=lambda t: peft_base.weights[t].to(dtype))
    theirs = [t for name, t in sorted(saved_tensors.items()) if "tinylora_P" in name]
    # By name, down_proj comes before q_proj; the model has them the other way round.
    ours = [drawn[1], drawn[0], drawn[3], drawn[2]]
    assert len(theirs) == 4
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(theirs, ours, strict=True))


@pytest.mark.parametrize("tying", [0.0, 0.1, 0.25, 0.5, 0.6, 0.7, 0.99, 1.0])
def test_groups_are_pefts(peft_base: Any, tying: float) -> None:
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
    config = TinyLoraConfig(r=2, u=3, weight_tying=tying, target_modules=modules)
    model = peft_base.adapted(config)
    assert peft_base.error(peft_base.read(peft_base.save(model)), model) < 1e-4


def test_what_a_seed_stands_for_is_bounded(peft_base: Any) -> None:
    out = saved(peft_base, u=20_000, save_projection=False, weight_tying=1.0)
    with pytest.raises(AdapterTooLarge, match="u: 20000 matrices exceed 200000 bytes"):
        peft_base.read(out, max_bytes=200_000)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("base_model.tinylora_v.2", None, r"base_model\.tinylora_v\.2: is missing"),
        ("base_model.tinylora_v.4", torch.ones(4), r"tinylora_v\.4: 4 modules make 4 groups"),
        ("base_model.tinylora_v.0", torch.ones(5), r"tinylora_v\.0: shape \[5\] must be \[4\]"),
        ("base_model.tinylora_v.01", torch.ones(4), "is not a tensor of a tinylora adapter"),
        ("base_model.tinylora_w", torch.ones(4), "is not a tensor of a tinylora adapter"),
        (f"{PREFIX}.tinylora_A", None, r"q_proj\.tinylora_A: is missing"),
        (f"{PREFIX}.tinylora_B", torch.ones(30, 2), r"shape \[30, 2\] must be \[30, 3\]"),
        (f"{PREFIX}.tinylora_P", None, r"q_proj\.tinylora_P: is missing"),
        (f"{PREFIX}.tinylora_P", torch.ones(4, 3, 2), r"shape \[4, 3, 2\] must be \[4, 3, 3\]"),
        (f"{PREFIX}.tinylora_v", torch.ones(4), "is not a tensor of a tinylora adapter"),
    ],
)
def test_wrong_tensor_is_refused_by_name(
    peft_base: Any, name: str, value: torch.Tensor | None, message: str
) -> None:
    out = saved(peft_base)
    tensors = peft_base.tensors(out)
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value
    with pytest.raises(AdapterRejected, match=message):
        peft_base.read(peft_base.put(out, tensors))
    assert not peft_base.bases.all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["q_proj"]}, "down_proj is not targeted but has tensors: numbering"),
        ({"target_modules": [*TARGETS, "embed_tokens"]}, "embed_tokens is targeted but has no"),
        ({"target_modules": r"(q|down)_proj"}, "target_modules: must be a list of module names"),
        ({"weight_tying": 1.5}, "weight_tying: must be from 0 to 1"),
        ({"weight_tying": 0.5}, r"tinylora_v\.\d: 4 modules make 2 groups .*weight_tying 0.5"),
        ({"projection_seed": 1.5}, "projection_seed: must be an integer"),
        ({"r": 0}, "r: must be a positive integer"),
        ({"u": 5}, r"tinylora_v\.0: shape \[4\] must be \[5\]"),
        ({"bias": "tinylora_only"}, "bias: trained biases"),
    ],
)
def test_config_is_checked(peft_base: Any, changes: dict[str, object], message: str) -> None:
    with pytest.raises(AdapterRejected, match=message):
        peft_base.read(peft_base.edit(saved(peft_base), **changes))


def test_rank_of_a_small_weight_is_its_own(peft_base: Any) -> None:
    model = peft_base.adapted(TinyLoraConfig(r=12, u=2, target_modules=["k_proj", "o_proj"]))
    peft_base.canonical = compute_basis(peft_base.weights.__getitem__, peft_base.shape, 12)
    weights = peft_base.read(peft_base.save(model))
    assert weights.tensors[Target(0, "k_proj")][0].shape[0] == 10
    assert peft_base.error(weights, model) < 1e-4
