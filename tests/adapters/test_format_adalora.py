"""AdaLoRA: ranks that differ and may be zero, and a scale that does not follow them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.record import from_record, to_record
from shoal.adapters.spec import Target

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q0, V0, UP1 = Target(0, "q_proj"), Target(0, "v_proj"), Target(1, "up_proj")
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
# What rank allocation might keep; the modules that are not named keep everything.
KEPT = {
    "model.layers.0.self_attn.q_proj": [True, False, True, False],
    "model.layers.0.self_attn.v_proj": [False, False, False, False],
    "model.layers.1.mlp.up_proj": [False, False, False, True],
}


def config(**more: Any) -> Any:
    return AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=ALL, **more)


def allocated(peft_base: Any, **more: Any) -> Path:
    model = peft_base.adapted(config(**more))
    model.peft_config["default"].rank_pattern = {f"{p}.lora_E": m for p, m in KEPT.items()}
    return Path(peft_base.save(model))


def loaded(peft_base: Any, saved: Path) -> Any:
    """What PEFT makes of the files: the ranks and scales that count."""
    return PeftModel.from_pretrained(peft_base.model(), saved).eval()


@pytest.mark.parametrize("alpha", [6, 0, -1])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_outputs_are_pefts(peft_base: Any, alpha: int, dtype: torch.dtype | None) -> None:
    saved = allocated(peft_base, lora_alpha=alpha)
    if dtype is not None:
        tensors = peft_base.tensors(saved)
        peft_base.put(saved, {name: tensor.to(dtype) for name, tensor in tensors.items()})
    weights = peft_base.read(saved)
    assert (weights.format, weights.family) == ("adalora", "lora")
    assert peft_base.error(weights, loaded(peft_base, saved)) < 1e-4


def test_before_allocation_every_module_has_all_ranks(peft_base: Any) -> None:
    model = peft_base.adapted(config(lora_alpha=3))
    weights = peft_base.read(peft_base.save(model))
    assert {parts[0].shape[0] for parts in weights.tensors.values()} == {4}
    assert peft_base.error(weights, model) < 1e-4


def test_pefts_own_allocation_is_read(peft_base: Any) -> None:
    model = peft_base.adapted(
        AdaLoraConfig(
            init_r=4, target_r=1, tinit=1, tfinal=1, total_step=6, lora_alpha=6, target_modules=ALL
        )
    ).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.arange(12)[None]
    for step in range(7):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    saved = peft_base.save(model.eval())
    weights = peft_base.read(saved)
    ranks = [parts[0].shape[0] for parts in weights.tensors.values()]
    assert len(ranks) < 14  # some modules were left with nothing
    assert sum(ranks) == 14  # target_r for each
    assert peft_base.error(weights, loaded(peft_base, saved)) < 1e-4


def test_modules_of_rank_zero_are_left_out(peft_base: Any) -> None:
    saved = allocated(peft_base)
    assert peft_base.tensors(saved)[PREFIX.replace("q_", "v_") + ".lora_A"].shape == (0, 21)
    weights = peft_base.read(saved)
    assert V0 not in weights.tensors
    assert V0 not in weights.scales
    assert weights.tensors[Q0][0].shape == (2, 21)
    assert weights.tensors[UP1][1].shape == (27, 1)
    again = from_record(to_record(weights), peft_base.shape)
    assert set(again.tensors) == set(weights.tensors)


def test_all_of_rank_zero_is_refused(peft_base: Any) -> None:
    saved = allocated(peft_base)
    tensors = peft_base.tensors(saved)
    empty = {n: t[:, :0] if "lora_B" in n else t[:0] for n, t in tensors.items()}
    peft_base.edit(saved, rank_pattern=None)
    with pytest.raises(AdapterRejected, match="every module has rank 0"):
        peft_base.read(peft_base.put(saved, empty))


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("lora_E", None, r"q_proj\.lora_E: is missing"),
        ("lora_E", torch.ones(2), "lora_E: shape .* must have two axes"),
        ("lora_E", torch.ones(2, 2), r"lora_E: shape \[2, 2\] must be \[2, 1\]"),
        ("lora_E", torch.ones(3, 1), r"lora_E: has rank 3|lora_A: shape \[2, 21\] must be"),
        ("lora_A", torch.ones(3, 21), r"lora_A: shape \[3, 21\] must be \[2, 21\]"),
        ("lora_B", torch.ones(30, 1), r"lora_B: shape \[30, 1\] must be \[30, 2\]"),
        ("lora_B", torch.full((30, 2), 3e38), "the product of lora_B and lora_E overflows"),
        ("ranknum", torch.ones(1), "is not a tensor of a adalora adapter"),
        ("lora_magnitude_vector", torch.ones(30), "DoRA magnitudes are served beside"),
    ],
)
def test_wrong_tensor_is_refused_by_name(
    peft_base: Any, kind: str, value: torch.Tensor | None, message: str
) -> None:
    saved = allocated(peft_base)
    tensors = peft_base.tensors(saved)
    tensors[f"{PREFIX}.lora_E"] *= 1e3
    tensors.pop(f"{PREFIX}.{kind}", None)
    if value is not None:
        tensors[f"{PREFIX}.{kind}"] = value
    with pytest.raises(AdapterRejected, match=message):
        peft_base.read(peft_base.put(saved, tensors))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_r": 1}, r"lora_E: has rank \d; adapter_config.json says at most 1 \(init_r\)"),
        ({"init_r": 0}, "init_r: must be a positive integer"),
        ({"lora_alpha": "6"}, "lora_alpha: must be a finite number"),
        ({"rank_pattern": [1]}, "rank_pattern: must be an object of masks"),
        (
            {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True] * 3}},
            r"q_proj\.lora_E: has rank 2; adapter_config.json says 3 \(rank_pattern\)",
        ),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa trains on changed base"),
        ({"use_dora": True}, "use_dora: DoRA is served with plain LoRA only"),
        ({"bias": "all"}, "bias: trained biases"),
        ({"base_correction": {"method": "milora"}}, "base_correction: is served with plain LoRA"),
        ({"peft_type": "LORA"}, "peft_type: is LORA, but the tensors are those of adalora"),
    ],
)
def test_config_is_checked(peft_base: Any, changes: dict[str, object], message: str) -> None:
    with pytest.raises(AdapterRejected, match=message):
        peft_base.read(peft_base.edit(allocated(peft_base), **changes))
