"""What each method adds to a linear."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from shoal.adapters.training.config import METHOD_NAMES, MethodName, TrainConfig
from shoal.adapters.training.errors import BaseRejected, OptionRejected
from shoal.adapters.training.method_options import RANKLESS, UNSCALED
from shoal.adapters.training.methods.attaching import shape_of, weight_reader
from shoal.adapters.training.methods.contract import AdaptedLinear
from shoal.adapters.training.methods.lora import LoraLinear
from shoal.adapters.training.methods.lora_xs import CoreLinear
from shoal.adapters.training.methods.miss import FoldLinear
from shoal.adapters.training.methods.source import Source
from shoal.adapters.training.methods.table import attach_all, method_of

# Those that always start at the same values.
SEEDLESS = ("miss", "pissa", "milora", "vera", "svf", "svft")


def config_for(method: MethodName, base: Path, **options: object) -> TrainConfig:
    asked: dict[str, object] = ({} if method in RANKLESS else {"rank": 4}) | options
    return TrainConfig(method=method, base=base, data=base, out=base, **asked)  # type: ignore[arg-type]


def source_of(model: nn.Module, folder: Path) -> Source:
    return Source(weight_reader(model), shape_of(model, "tiny", "0" * 64), folder)


def linear_with_bias() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(10, 6).double().requires_grad_(False)


def randomise(adapted: AdaptedLinear) -> list[Tensor]:
    """Random values; those of its only lane."""
    for parameter in adapted.factors().values():
        nn.init.normal_(parameter)
    return [parameter[0] for parameter in adapted.factors().values()]


def test_lora_xs_applies_the_formula_before_the_bias() -> None:
    linear = linear_with_bias()
    basis = torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64)).Q
    adapted = CoreLinear(linear, basis, torch.zeros(1, 3, 3), 0.5).double()
    [core] = randomise(adapted)
    x = torch.randn(2, 5, 10, dtype=torch.float64)

    merged = linear.weight + 0.5 * basis @ core @ basis.T @ linear.weight
    torch.testing.assert_close(adapted(x), x @ merged.T + linear.bias)


@pytest.mark.parametrize("rank", [1, 3, 4, 5, 10])
def test_miss_applies_the_formula_also_when_the_rank_does_not_divide(rank: int) -> None:
    linear = linear_with_bias()
    adapted = FoldLinear(linear, rank, 1).double()
    [block] = randomise(adapted)
    x = torch.randn(2, 5, 10, dtype=torch.float64)

    delta = torch.stack([block[column % rank] for column in range(10)], dim=1)
    expected = x @ (linear.weight + delta).T + linear.bias
    torch.testing.assert_close(adapted(x), expected)


def test_lora_applies_the_formula() -> None:
    linear = linear_with_bias()
    adapted = LoraLinear(linear, torch.zeros(1, 3, 10), torch.zeros(1, 6, 3), 2.0).double()
    down, up = randomise(adapted)
    x = torch.randn(2, 5, 10, dtype=torch.float64)

    expected = x @ (linear.weight + 2.0 * up @ down).T + linear.bias
    torch.testing.assert_close(adapted(x), expected)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_fresh_adapter_changes_nothing_to_speak_of_and_only_it_is_trained(
    method: MethodName, base: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        before = model(input_ids=ids).logits
    config = config_for(method, base, targets=("q_proj", "down_proj"))
    adapted = attach_all(model, config, source_of(model, tmp_path))
    with torch.no_grad():
        after = model(input_ids=ids).logits

    assert [str(target) for target in adapted] == [
        "layers.0.q_proj", "layers.0.down_proj", "layers.1.q_proj", "layers.1.down_proj"
    ]  # fmt: skip
    torch.testing.assert_close(after, before, atol=5e-3, rtol=0)
    trained = {
        id(parameter) for linear in adapted.values() for parameter in linear.factors().values()
    }
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_the_seed_decides_the_initial_values(
    method: MethodName, base: Path, tmp_path: Path
) -> None:
    def initial(seed: int) -> list[Tensor]:
        model = AutoModelForCausalLM.from_pretrained(base)
        config = config_for(method, base, seed=seed)
        adapted = attach_all(model, config, source_of(model, tmp_path))
        return [part for linear in adapted.values() for part in linear.values(0).values()]

    first, again, other = initial(1), initial(1), initial(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    differs = any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert differs == (method not in SEEDLESS)


def test_a_rank_that_does_not_fit_is_refused(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(OptionRejected, match="rank is 17: must not exceed 16"):
        attach_all(model, config_for("lora", base, rank=17), source_of(model, tmp_path))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("adalora", {"init_rank": 17}, "init-rank is 17: must not exceed 16"),
        ("miss", {"mini_r": 5}, "mini-r is 5: must divide the 32 outputs"),
        ("svft", {"off_diagonals": 32}, "off-diagonals is 32: must not exceed 31"),
    ],
)
def test_an_option_that_does_not_fit_the_base_is_refused(
    method: MethodName, options: dict[str, object], message: str, base: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(OptionRejected, match=message):
        attach_all(model, config_for(method, base, **options), source_of(model, tmp_path))


def test_a_model_without_the_expected_linears_is_refused() -> None:
    with pytest.raises(BaseRejected, match="q_proj"):
        shape_of(nn.Sequential(nn.Linear(2, 2)), "wrong", "0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dora2"}, "method is dora2: must be one of lora, rslora, .*, svft"),
        ({"method": "miss", "alpha": 8.0}, "alpha is 8.0: miss has none"),
        (
            {"method": "lora", "format": "official"},
            "format is official: belongs to lora-xs, pissa, milora, not to lora",
        ),
        ({"method": "lora", "basis_rank": 8}, "basis-rank is 8: belongs to lora-xs, not to lora"),
        ({"rank": 9, "basis_rank": 8}, "basis-rank is 8: rank 9 needs more"),
        ({"format": "zip"}, "format is zip: must be one of compact, official, residual, converted"),
        ({"method": "svf"}, "rank is 4: svf has none"),
        ({"method": "vera", "alpha": 2.0}, "alpha is 2.0: vera has none"),
        ({"method": "lora", "lr_ratio": 4.0}, "lr-ratio is 4.0: belongs to lora-plus, not to lora"),
        ({"method": "lora-plus", "lr_ratio": 0.0}, "lr-ratio is 0.0: must be positive"),
        ({"method": "pissa", "format": "residual"}, "format is residual: needs svd exact"),
        ({"method": "milora", "format": "compact"}, "milora has residual and converted"),
        ({"method": "milora", "svd": "exact"}, "svd is exact: belongs to lora-xs, pissa"),
        ({"init": "random", "vectors": "top"}, "vectors is top: init random has no order"),
        ({"init": "random", "svd": "exact"}, "svd is exact: init random takes none of W"),
        ({"init": "orthonormal", "no_sigma": True}, "init orthonormal has no singular values"),
        ({"vectors": "bottom", "svd": "randomised"}, "randomised: finds top vectors alone"),
        ({"vectors": "bottom", "format": "compact"}, "compact: holds only what lies on the base"),
        ({"vectors": "middle"}, "vectors is middle: must be one of top, bottom"),
        ({"method": "miss", "shard": "output", "mini_r": 2}, "mini-r is 2: has no output shards"),
        ({"method": "miss", "mini_r": 0}, "mini-r is 0: must be at least 1"),
        ({"method": "adalora", "init_rank": 3}, "init-rank is 3: rank 4 needs more"),
        ({"method": "adalora", "beta1": 1.0}, "beta1 is 1.0: must be between 0 and 1"),
        ({"method": "adalora", "orthogonality": -1.0}, "orthogonality is -1.0: must not be neg"),
        (
            {"method": "adalora", "steps": 10, "tinit": 4, "tfinal": 6},
            "tfinal is 6: leaves none of 10 steps for allocation: 4 before, 6 after",
        ),
        ({"method": "vera", "d_initial": -0.1}, "d-initial is -0.1: must be positive"),
        ({"method": "svft", "off_diagonals": -1, "rank": 16}, "off-diagonals is -1: must be at"),
        ({"steps": 0}, "steps is 0: must be at least 1"),
        ({"batch_size": -1}, "batch-size is -1: must be at least 1"),
        ({"lr": float("nan")}, "lr is nan: must be a positive number"),
        ({"alpha": 0.0}, "alpha is 0.0: must be a positive number"),
        ({"warmup": 1.0}, "warmup is 1.0: must be at least 0 and below 1"),
        ({"targets": ("q_proj", "lm_head")}, "targets is .*lm_head.* not among"),
        ({"targets": ("q_proj", "q_proj")}, "names a linear twice"),
        ({"targets": ()}, "must name at least one"),
        ({"seed": -1}, "seed is -1: must not be negative"),
        ({"steps": 10**10}, "steps is 10000000000: must be at most 10000000"),
        ({"resume": True, "overwrite": True}, "overwrite is True: excludes resume"),
    ],
)
def test_options_that_break_a_rule_are_refused_by_name(
    options: dict[str, object], message: str, tmp_path: Path
) -> None:
    paths = {"base": tmp_path, "data": tmp_path, "out": tmp_path}
    asked = {"method": "lora-xs", "rank": 4, **paths, **options}
    with pytest.raises(OptionRejected, match=message):
        TrainConfig(**asked)  # type: ignore[arg-type]


# Another value of every option that belongs to methods, by method.
OPTIONS: dict[MethodName, dict[str, object]] = {
    "lora-plus": {"lr_ratio": 3.0},
    "pissa": {"svd": "exact"},
    "milora": {"format": "converted"},
    "lora-xs": {
        "format": "official", "init": "random", "vectors": "bottom", "no_sigma": True,
        "svd": "randomised", "basis_rank": 32,
    },
    "miss": {"shard": "output", "mini_r": 2},
    "adalora": {
        "init_rank": 40, "tinit": 3, "tfinal": 4, "delta_t": 2, "orthogonality": 0.1,
        "beta1": 0.5, "beta2": 0.5,
    },
    "vera": {"projection_seed": 5, "d_initial": 0.3},
    "svf": {"svf_vector": "z"},
    "svft": {"pattern": "random", "off_diagonals": 2},
}  # fmt: skip


def test_every_option_reaches_its_method(tmp_path: Path) -> None:
    known = {spec.name for spec in fields(TrainConfig) if spec.metadata.get("methods")}
    assert {name for options in OPTIONS.values() for name in options} == known
    for method, options in OPTIONS.items():
        plain = method_of(config_for(method, tmp_path))
        for name, value in options.items():
            # The basis is the base's, not the method's.
            same = name == "basis_rank"
            asked = method_of(config_for(method, tmp_path, **{name: value}))
            assert (asked == plain) == same, name
    for method in METHOD_NAMES:
        if method not in RANKLESS:
            ranks = [method_of(config_for(method, tmp_path, rank=rank)) for rank in (4, 8)]
            assert ranks[0] != ranks[1]
        if method not in UNSCALED:
            scales = [method_of(config_for(method, tmp_path, alpha=alpha)) for alpha in (1.0, 2.0)]
            assert scales[0] != scales[1]
