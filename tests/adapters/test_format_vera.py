"""VeRA: projections that all modules share, saved or drawn again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import VeraConfig, get_peft_model

from shoal.adapters.errors import AdapterRejected, AdapterTooLarge
from shoal.adapters.spec import Target

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
K0, DOWN1 = Target(0, "k_proj"), Target(1, "down_proj")
PREFIX = "base_model.model.model.layers.0.self_attn.k_proj"


def saved(peft_base: Any, **config: Any) -> Path:
    config = {"r": 5, "target_modules": ["k_proj", "down_proj"]} | config
    return Path(peft_base.save(peft_base.adapted(VeraConfig(**config))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key", [0, 7, 2**40])
def test_projections_are_drawn_bit_for_bit(peft_base: Any, dtype: torch.dtype, key: int) -> None:
    config = VeraConfig(
        r=5,
        target_modules=["k_proj", "down_proj"],
        save_projection=False,
        projection_prng_key=key,
    )
    model = get_peft_model(peft_base.model().to(dtype), config)
    for name, parameter in model.named_parameters():
        if "vera_lambda" in name:
            parameter.data.fill_(1.0)
    out = peft_base.save(model)
    assert not any("vera_A" in name for name in peft_base.tensors(out))
    weights = peft_base.read(out, weight_of=lambda t: peft_base.weights[t].to(dtype))
    theirs_a, theirs_b = model.base_model.vera_A["default"], model.base_model.vera_B["default"]
    assert theirs_a.dtype == torch.float32  # whatever the base is, rounded to it or not
    for target, d_in, d_out in ((K0, 21, 10), (DOWN1, 27, 21)):
        a, b = weights.tensors[target]
        assert torch.equal(a, theirs_a[:, :d_in])
        assert torch.equal(b, theirs_b[:d_out])


def test_served_as_lora_of_scale_one(peft_base: Any) -> None:
    weights = peft_base.read(saved(peft_base))
    assert (weights.format, weights.family) == ("vera", "lora")
    assert set(weights.scales.values()) == {1.0}
    assert all(a.is_contiguous() for a, _ in weights.tensors.values())


def test_saved_projections_count_also_when_the_config_denies_them(peft_base: Any) -> None:
    out = saved(peft_base)
    a = peft_base.read(out).tensors[K0][0]
    assert torch.equal(peft_base.read(peft_base.edit(out, save_projection=False)).tensors[K0][0], a)
    peft_base.edit(out, projection_prng_key=1)
    assert torch.equal(peft_base.read(out).tensors[K0][0], a)


def test_projections_may_be_wider_than_needed(peft_base: Any) -> None:
    out = saved(peft_base)
    before = peft_base.read(out)
    tensors = peft_base.tensors(out)
    for name, columns in (("base_model.vera_A", (0, 3)), ("base_model.vera_B", (0, 0, 0, 3))):
        tensors[name] = torch.nn.functional.pad(tensors[name], columns, value=9.0)
    after = peft_base.read(peft_base.put(out, tensors))
    for target in before.tensors:
        assert all(map(torch.equal, before.tensors[target], after.tensors[target]))


def test_what_the_lambdas_stand_for_is_bounded(peft_base: Any) -> None:
    out = saved(peft_base, r=400, save_projection=False, target_modules=["down_proj"])
    size = sum(file.stat().st_size for file in out.iterdir())
    assert size < 10_000
    needed = 2 * 4 * 400 * (21 + 27)
    with pytest.raises(AdapterTooLarge, match=r"exceeds .* once expanded to factors of its own"):
        peft_base.read(out, max_bytes=needed - 1)
    assert peft_base.read(out, max_bytes=needed).rank == 400


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("base_model.vera_A", None, r"base_model\.vera_A: is missing"),
        ("base_model.vera_B", None, r"base_model\.vera_B: is missing"),
        ("base_model.vera_A", torch.ones(5), "vera_A: shape .* must have two axes"),
        ("base_model.vera_A", torch.ones(5, 26), "vera_A: shape .* must be at least 27 on axis 1"),
        ("base_model.vera_B", torch.ones(20, 5), "vera_B: shape .* must be at least 21 on axis 0"),
        ("base_model.vera_A", torch.ones(4, 27), r"vera_A: shape \[4, 27\] must be \[5, 27\]"),
        ("base_model.vera_B", torch.ones(21, 6), r"vera_B: shape \[21, 6\] must be \[21, 5\]"),
        ("base_model.vera_A.weight", torch.ones(5, 27), "the same tensor is also given as"),
        ("base_model.vera_C", torch.ones(5), "is not a tensor of a vera adapter"),
        ("base_model.model.vera_A", torch.ones(5, 27), "is not a tensor of a vera adapter"),
        (f"{PREFIX}.vera_A", torch.ones(5, 27), "is not a tensor of a vera adapter"),
        (f"{PREFIX}.vera_lambda_b", None, r"k_proj\.vera_lambda_b: is missing"),
        (f"{PREFIX}.vera_lambda_b", torch.ones(9), r"vera_lambda_b: shape \[9\] must be \[10\]"),
        (f"{PREFIX}.vera_lambda_d", torch.ones(4), r"vera_lambda_d: shape \[4\] must be \[5\]"),
        (f"{PREFIX}.vera_lambda_b", torch.full((10,), 3e38), "lambdas overflows"),
        ("base_model.vera_A", torch.ones(0, 27), "has no elements"),
    ],
)
def test_wrong_tensor_is_refused_by_name(
    peft_base: Any, name: str, value: torch.Tensor | None, message: str
) -> None:
    out = saved(peft_base)
    tensors = peft_base.tensors(out)
    for kind in tensors:
        if "lambda_d" in kind:
            tensors[kind] *= 100
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value
    with pytest.raises(AdapterRejected, match=message):
        peft_base.read(peft_base.put(out, tensors))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["k_proj"]}, "model.layers.0.mlp.down_proj is not targeted but has"),
        (
            {"target_modules": ["k_proj", "down_proj", "q_proj"]},
            "model.layers.0.self_attn.q_proj is targeted but has no tensors: drawing vera_A",
        ),
        (
            {"target_modules": ["k_proj", "down_proj", "lm_head"]},
            "lm_head is targeted but has no tensors",
        ),
        ({"layers_to_transform": [1]}, "model.layers.0.* is not targeted but has tensors"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform: must be a layer or a list"),
        ({"exclude_modules": ["k_proj"]}, "k_proj is not targeted but has tensors"),
        ({"target_modules": "all-linear"}, "target_modules: must be a list of module names"),
        ({"target_modules": r".*\.(k_proj|down_proj)"}, "must be a list of module names"),
        ({"target_modules": None}, "target_modules: must be a list of module names"),
        ({"target_modules": [1]}, "target_modules: must be a list of module names"),
        ({"projection_prng_key": -1}, "projection_prng_key: must be an integer from 0"),
        ({"projection_prng_key": 1 << 62}, "projection_prng_key: must be an integer from 0"),
        ({"save_projection": True}, r"base_model\.vera_A: is missing"),
        ({"save_projection": None}, "save_projection: must be true or false"),
        ({"r": 4}, r"vera_lambda_d: shape \[5\] must be \[4\]"),
        ({"bias": "vera_only"}, "bias: trained biases"),
        ({"peft_type": "PVERA"}, "peft_type: is PVERA, but the tensors are those of vera"),
    ],
)
def test_config_is_checked_before_anything_is_drawn(
    peft_base: Any, changes: dict[str, object], message: str
) -> None:
    out = saved(peft_base, save_projection=False)
    with pytest.raises(AdapterRejected, match=message):
        peft_base.read(peft_base.edit(out, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["self_attn.k_proj", "mlp.down_proj"]},
        {"target_modules": ["k_proj", "down_proj", "gate_proj"], "exclude_modules": ["gate_proj"]},
        {"target_modules": r".*\.[kd][a-z]*_proj"},
        {"target_modules": ["k_proj", "down_proj"], "layers_to_transform": [0, 1]},
        {"layers_to_transform": [0, 1, 5], "layers_pattern": "layers"},
        {"layers_to_transform": []},
    ],
)
def test_any_way_to_name_the_same_modules_is_the_same(
    peft_base: Any, changes: dict[str, object]
) -> None:
    out = saved(peft_base, save_projection=False)
    a = peft_base.read(out).tensors[K0][0]
    assert torch.equal(peft_base.read(peft_base.edit(out, **changes)).tensors[K0][0], a)
