"""MiSS and Bone as PEFT writes them, and the output shards of the MiSS paper."""

from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.adapters.errors import AdapterRejected, AdapterTooLarge
from shoal.adapters.formats.writing import write_miss
from shoal.adapters.record import to_record
from shoal.adapters.spec import Target


@pytest.mark.parametrize("case", ["miss", "miss_ragged", "miss_mini", "bone", "miss_named"])
def test_delta_equals_what_peft_merges(golden: Any, case: str) -> None:
    weights = golden.read(golden.copy(case))
    assert (weights.format, weights.family, weights.basis_id) == ("miss", "fold", None)
    golden.assert_delta(weights, case)


def test_mini_is_tiled_to_all_outputs(golden: Any) -> None:
    weights = golden.read(golden.copy("miss_mini"))
    (d,) = weights.tensors[Target(0, "up_proj")]
    assert d.shape == (4, 24)
    assert torch.equal(d[:, :4], d[:, 4:8])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_keep_their_dtype(golden: Any, dtype: torch.dtype) -> None:
    case = golden.copy("miss")
    golden.save(case, {n: t.to(dtype) for n, t in golden.tensors(case).items()})
    weights = golden.read(case)
    assert all(parts[0].dtype == dtype for parts in weights.tensors.values())
    golden.assert_delta(weights, "miss", rtol=5e-3)


def test_bat_is_refused_and_says_what_to_do(golden: Any) -> None:
    case = golden.copy("miss_bat")
    with pytest.raises(AdapterRejected, match="shoal adapters convert --merge"):
        golden.read(case)
    with pytest.raises(AdapterRejected, match=r"layers\.0.*miss_block.*convert --merge"):
        golden.read(golden.edit_config(case, init_weights=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 3}, r"layers\.0\.self_attn\.q_proj\.miss_block: shape \[4, 16\] must be \[3, 16\]"),
        ({"r": 0}, r"adapter_config\.json: r: must be a positive integer"),
        ({"r": "4"}, "r: must be a positive integer"),
        ({"r": True}, "r: must be a positive integer"),
        ({"r": 17}, r"r is 17, must be at most d_in 16"),
        ({"init_weights": "mini", "mini_r": 3}, "mini_r 3 must divide"),
        ({"init_weights": "mini", "mini_r": 4}, r"must be \[4, 4\]"),
        ({"init_weights": "other"}, "init_weights: must be true, false"),
        ({"init_weights": ["bat"]}, "init_weights"),
        ({"peft_type": "BONE"}, "miss_block: peft_type BONE holds one bone_block"),
        ({"peft_type": "LORA"}, "peft_type: is LORA, but the tensors are those of miss"),
        ({"peft_type": ["MISS"]}, "peft_type"),
        ({"bias": "all"}, "bias: trained biases"),
        (
            {"base_correction": {"method": "milora", "r": 4}},
            "base_correction: is served with plain LoRA",
        ),
    ],
)
def test_contradicting_config_is_refused_by_name(
    golden: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterRejected, match=message):
        golden.read(golden.edit_config(golden.copy("miss"), **changes))


def test_mini_cannot_expand_beyond_the_limit(golden: Any) -> None:
    case = golden.copy("miss_mini")
    with pytest.raises(AdapterTooLarge, match="once expanded"):
        golden.read(case, max_bytes=3200)


def test_what_is_written_is_read_back(golden: Any) -> None:
    d = {t: torch.randn(5, golden.shape.dims[t.module].d_out) for t in golden.shape.targets()}
    write_miss(golden.folder / "out", d, rank=5, shape=golden.shape, extra_config={"note": "n"})
    weights = golden.read(golden.folder / "out")
    assert (weights.family, weights.rank) == ("fold", 5)
    assert all(torch.equal(weights.tensors[t][0], d[t]) for t in d)
    assert set(weights.scales.values()) == {1.0}


def test_layout_is_that_of_peft(golden: Any) -> None:
    peft = golden.copy("miss_ragged")
    weights = golden.read(peft)
    blocks = {target: parts[0] for target, parts in weights.tensors.items()}
    write_miss(golden.folder / "out", blocks, rank=5, shape=golden.shape)
    ours, theirs = golden.tensors(golden.folder / "out"), golden.tensors(peft)
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert to_record(golden.read(golden.folder / "out")) == to_record(weights)


# ---------------------------------------------------------------------------- the paper's shards


def target_of(name: str) -> Target:
    parts = name.split(".")
    return Target(int(parts[4]), parts[6])


def output_shards(golden: Any, rank: int, dtype: torch.dtype = torch.float32) -> Any:
    """``miss``' directory with ``D (rank, d_in)`` of the paper's equation 3 instead."""
    case = golden.copy("miss")
    generator = torch.Generator().manual_seed(rank)
    d = {
        name: torch.randn(rank, golden.weights[target_of(name)].shape[1], generator=generator)
        for name in golden.tensors(case)
    }
    golden.save(case, {name: tensor.to(dtype) for name, tensor in d.items()})
    return golden.edit_config(case, r=rank, shard="output")


def expand(d: Tensor, d_out: int) -> Tensor:
    """Equation 3: rows of D, each repeated as often as its shard has outputs, one below another."""
    rank = d.shape[0]
    sizes = [d_out // rank + (i < d_out % rank) for i in range(rank)]
    assert sum(sizes) == d_out
    return torch.cat([torch.ones(s, 1, dtype=d.dtype) @ d[i : i + 1] for i, s in enumerate(sizes)])


@pytest.mark.parametrize("rank", [1, 4, 5, 8])  # 5 divides none of 8, 16 and 24
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_shards_are_equation_3(golden: Any, rank: int, dtype: torch.dtype) -> None:
    case = output_shards(golden, rank, dtype)
    weights = golden.read(case)
    assert (weights.format, weights.family, weights.rank) == ("miss", "lora", rank)
    for name, d in golden.tensors(case).items():
        target = target_of(name)
        a, b = weights.tensors[target]
        assert a.dtype == b.dtype == dtype
        want = expand(d.double(), b.shape[0])
        assert torch.equal(golden.delta(weights, target), want)
        assert set(b.unique().tolist()) <= {0.0, 1.0}


def test_golden_output_shards(golden: Any) -> None:
    golden.assert_delta(golden.read(golden.copy("miss_output")), "miss_output")


def test_a_shard_is_never_of_outputs_unless_the_config_says_so(golden: Any) -> None:
    case = output_shards(golden, 4)
    with pytest.raises(AdapterRejected, match=r"shape \[4, 16\] must be \[4, 8\]"):
        golden.read(golden.edit_config(case, shard=None))  # k_proj (8, 16) tells; q_proj cannot
    with pytest.raises(AdapterRejected, match=r"shape \[4, 16\] must be \[4, 8\]"):
        golden.read(golden.edit_config(case, shard="input"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard": "rows"}, "shard: must be input or output, and only of peft_type MISS"),
        ({"shard": ["output"]}, "shard: must be input or output"),
        ({"init_weights": "mini", "mini_r": 4}, "init_weights: mini has no output shards"),
        ({"init_weights": "bat"}, "shoal adapters convert --merge"),
        ({"r": 3}, r"shape \[4, 16\] must be \[3, 16\]"),
        ({"r": 9}, r"k_proj.*r is 9, must be at most d_out 8|q_proj.*must be \[9, 16\]"),
    ],
)
def test_bad_output_shards_are_named(golden: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterRejected, match=message):
        golden.read(golden.edit_config(output_shards(golden, 4), **changes))


def test_output_shards_are_bounded_before_they_are_expanded(golden: Any) -> None:
    with pytest.raises(AdapterTooLarge, match="exceeds 14000 bytes once expanded"):
        golden.read(output_shards(golden, 8), max_bytes=14000)
