"""DoRA: the magnitudes become one factor per output, from the base's own weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.formats.dora import row_norms
from shoal.adapters.spec import Target

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
Q0 = Target(0, "q_proj")
PREFIX = "base_model.model.model.layers.0.self_attn"
M = f"{PREFIX}.q_proj.lora_magnitude_vector"


@pytest.fixture
def saved(peft_base: Any) -> Path:
    """An adapter on q_proj and v_proj as PEFT saves it."""
    config = LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=["q_proj", "v_proj"])
    return Path(peft_base.save(peft_base.adapted(config)))


def test_factor_is_magnitude_by_row_norm(peft_base: Any, saved: Path) -> None:
    weights = peft_base.read(saved)
    assert (weights.format, weights.family) == ("dora", "lora")
    assert set(weights.row_scales) == set(weights.tensors)
    m = peft_base.tensors(saved)[M].double()
    a, b = (part.double() for part in weights.tensors[Q0])
    adapted = peft_base.weights[Q0].double() + 2.0 * b @ a
    assert torch.allclose(weights.row_scales[Q0].double(), m / adapted.norm(dim=1), rtol=1e-6)
    assert weights.row_scales[Q0].dtype == torch.float32


def test_untrained_magnitudes_scale_by_one(peft_base: Any) -> None:
    config = LoraConfig(r=3, use_dora=True, target_modules=["q_proj"])
    weights = peft_base.read(peft_base.save(get_peft_model(peft_base.model(), config)))
    ones = torch.ones(30)
    assert all(torch.allclose(g, ones, atol=1e-6) for g in weights.row_scales.values())


@pytest.mark.parametrize("rows", [1, 511, 512, 513, 1025])
def test_row_norms_are_whole_whatever_the_chunks(rows: int) -> None:
    w, a, b = torch.randn(rows, 5), torch.randn(2, 5), torch.randn(rows, 2)
    expected = (w.double() - 0.5 * b.double() @ a.double()).norm(dim=1)
    assert torch.allclose(row_norms(w, a, b, -0.5), expected, rtol=1e-12)


def test_norms_survive_what_a_square_would_cancel() -> None:
    a = torch.randn(2, 9).bfloat16().float()
    b = torch.randn(4, 2).bfloat16().float()
    w = -(b.double() @ a.double()) * (1 + 1e-9)
    norms = row_norms(w, a, b, 1.0)
    assert torch.allclose(norms, (b.double() @ a.double()).norm(dim=1) * 1e-9, rtol=1e-5)


def test_suffix_weight_is_optional(peft_base: Any, saved: Path) -> None:
    before = peft_base.read(saved).row_scales[Q0]
    tensors = peft_base.tensors(saved)
    tensors[f"{M}.weight"] = tensors.pop(M)
    assert torch.equal(peft_base.read(peft_base.put(saved, tensors)).row_scales[Q0], before)


def test_conversion_that_dropped_the_magnitudes_is_refused(peft_base: Any) -> None:
    config = LoraConfig(
        r=3, use_dora=True, init_lora_weights="pissa", target_modules=["q_proj", "v_proj"]
    )
    model = get_peft_model(peft_base.model(), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(peft_base.folder / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    out = peft_base.folder / "converted"
    initial = str(peft_base.folder / "initial")
    model.save_pretrained(out, path_initial_model_for_weight_conversion=initial)
    with pytest.raises(
        AdapterRejected, match=r"use_dora: is true, but the file holds no lora_magnitude_vector.*"
    ):
        peft_base.read(out)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (M, None, r"q_proj\.lora_magnitude_vector: is missing"),
        (M, torch.ones(29), r"lora_magnitude_vector: shape \[29\] must be \[30\]"),
        (M, torch.ones(30, 1), r"lora_magnitude_vector: shape \[30, 1\] must be \[30\]"),
        (M, torch.full((30,), torch.nan), "lora_magnitude_vector: every value must be finite"),
        (f"{PREFIX}.q_proj.lora_A.weight", None, r"q_proj\.lora_A: is missing"),
        (f"{PREFIX}.k_proj.lora_magnitude_vector", torch.ones(10), r"k_proj\.lora_A: is missing"),
        (f"{PREFIX}.q_proj.lora_E", torch.ones(3, 1), "peft_type: is LORA, but .* adalora"),
    ],
)
def test_wrong_tensor_is_refused_by_name(
    peft_base: Any, saved: Path, name: str, value: torch.Tensor | None, message: str
) -> None:
    tensors = peft_base.tensors(saved)
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value
    with pytest.raises(AdapterRejected, match=message):
        peft_base.read(peft_base.put(saved, tensors))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": False}, "use_dora: must be true: the file holds lora_magnitude_vector"),
        ({"use_dora": "yes"}, "use_dora: must be true or false"),
        ({"lora_bias": True}, "lora_bias: biases"),
        ({"init_lora_weights": "corda"}, "init_lora_weights: corda trains on a base"),
        ({"base_correction": {"method": "pissa", "r": 11}}, "exceeds the 10 singular values"),
        ({"peft_type": "ADALORA"}, "peft_type: is ADALORA, but the tensors are those of dora"),
    ],
)
def test_config_is_checked(
    peft_base: Any, saved: Path, config: dict[str, object], message: str
) -> None:
    with pytest.raises(AdapterRejected, match=message):
        peft_base.read(peft_base.edit(saved, **config))


def test_row_of_zeros_is_refused(peft_base: Any, saved: Path) -> None:
    tensors = peft_base.tensors(saved)
    tensors[f"{PREFIX}.q_proj.lora_B.weight"][7] = 0
    peft_base.weights[Q0] = peft_base.weights[Q0].clone()
    peft_base.weights[Q0][7] = 0
    with pytest.raises(AdapterRejected, match="scales row 7 of the adapted weight, whose norm is"):
        peft_base.read(peft_base.put(saved, tensors))
    peft_base.weights[Q0][7] = 1e-38
    tensors[M][7] = 1e10
    with pytest.raises(AdapterRejected, match=r"lora_magnitude_vector: divided by the row norms"):
        peft_base.read(peft_base.put(saved, tensors))


def test_correction_becomes_factors_that_the_magnitudes_multiply(
    peft_base: Any, saved: Path
) -> None:
    weights = peft_base.read(peft_base.edit(saved, base_correction={"method": "milora"}))
    assert weights.correction is None
    assert {parts[0].shape[0] for parts in weights.tensors.values()} == {6}
    assert not list((peft_base.folder / "bases").iterdir())
    a, b = (part.double() for part in weights.tensors[Q0])
    u, s, vh = torch.linalg.svd(peft_base.weights[Q0].double(), full_matrices=False)
    plain = peft_base.read(peft_base.edit(saved, base_correction=None))
    a0, b0 = (part.double() for part in plain.tensors[Q0])
    delta = 2.0 * b0 @ a0 - (u[:, -3:] * s[-3:]) @ vh[-3:]
    assert torch.allclose(weights.scales[Q0] * b @ a, delta, atol=1e-5)
    adapted = (peft_base.weights[Q0].double() + delta).norm(dim=1)
    m = peft_base.tensors(saved)[M].double()
    assert torch.allclose(weights.row_scales[Q0].double(), m / adapted, rtol=1e-5)
