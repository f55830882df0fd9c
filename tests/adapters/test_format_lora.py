"""LoRA and rsLoRA as PEFT writes them, and everything that only looks like them."""

import math
import re
import time
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.formats.config_fields import LoraScaling
from shoal.adapters.formats.patterns import parse_pattern
from shoal.adapters.formats.writing import write_lora
from shoal.adapters.record import to_record
from shoal.adapters.spec import Target

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("case", ["lora", "lora_rs", "lora_patterns", "lora_partial"])
def test_delta_equals_what_peft_merges(golden: Any, case: str) -> None:
    weights = golden.read(golden.copy(case))
    assert (weights.format, weights.family, weights.basis_id) == ("lora", "lora", None)
    golden.assert_delta(weights, case)


def test_rank_patterns_show_in_the_tensors(golden: Any) -> None:
    weights = golden.read(golden.copy("lora_patterns"))
    ranks = {str(target): parts[0].shape[0] for target, parts in weights.tensors.items()}
    assert ranks["layers.1.q_proj"] == 2
    assert ranks["layers.0.up_proj"] == 3
    assert ranks["layers.1.up_proj"] == weights.rank == 4


def test_hostile_patterns_cost_little_or_are_refused(golden: Any) -> None:
    case = golden.copy("lora")
    literal = {"." * n + f"{i:03}": 1 for i in range(256) for n in range(4)}
    costly = {".+" * 60 + "x" * n: 1 for n in range(8)}
    began = time.process_time()
    golden.read(golden.edit_config(case, alpha_pattern=literal, rank_pattern=costly))
    assert time.process_time() - began < 5  # measured 0.4; exponential would never end
    for patterns, message in [
        (costly | {"a*": 1}, "at most 8"),
        (literal | {"b": 1}, "at most 1024"),
    ]:
        with pytest.raises(AdapterRejected, match=message):
            golden.read(golden.edit_config(case, rank_pattern=patterns))


def test_suffix_weight_is_optional(golden: Any) -> None:
    case = golden.copy("lora")
    golden.save(case, {n.removesuffix(".weight"): t for n, t in golden.tensors(case).items()})
    golden.assert_delta(golden.read(case), "lora")


def test_missing_fields_take_pefts_defaults(golden: Any) -> None:
    case = golden.copy("lora")
    (case / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert set(golden.read(case).scales.values()) == {8 / 4}


def test_overlapping_alpha_patterns_are_refused_unless_equal(golden: Any) -> None:
    case = golden.copy("lora")
    golden.edit_config(case, alpha_pattern={"q_proj": 1, "self_attn.q_proj": 1})
    assert golden.read(case).scales[Target(0, "q_proj")] == 1 / 4
    golden.edit_config(case, alpha_pattern={"q_proj": 1, "self_attn.q_proj": 2})
    with pytest.raises(AdapterRejected, match=r"alpha_pattern: gives model\.layers\.0.*several"):
        golden.read(case)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("lora_head", r"lm_head\.weight: .*output head"),
        ("lora_bias", r"lora_B\.bias: biases"),
    ],
)
def test_variants_that_peft_writes_are_refused(golden: Any, case: str, message: str) -> None:
    with pytest.raises(AdapterRejected, match=message):
        golden.read(golden.copy(case))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            ("init_lora_weights", name)
            for name in ("pissa_niter_4", "corda", "lora_ga", "loftq", "new", 3)
        ),
        ("use_dora", True),
        ("lora_bias", True),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("alora_invocation_tokens", [1, 2]),
        ("kasa_config", {"x": 1}),
        ("monteclora_config", {"x": 1}),
        ("velora_config", {"x": 1}),
        ("arrow_config", {"x": 1}),
        ("megatron_config", {"x": 1}),
        ("layer_replication", [[0, 1]]),
        ("target_parameters", ["mlp.experts"]),
        ("trainable_token_indices", [1]),
        ("modules_to_save", ["lm_head"]),
        ("fan_in_fan_out", True),
        ("bias", "lora_only"),
        ("bias", ["none"]),
        ("base_correction", {"method": "pissa", "r": 17}),
        ("base_correction", {"method": "pissa", "r": 0}),
        ("base_correction", {"method": "pissa", "rank": 4}),
        ("base_correction", {"method": "corda"}),
        ("base_correction", {"r": 4}),
        ("base_correction", "pissa"),
        ("r", 5),
        ("r", 1.5),
        ("r", -1),
        ("lora_alpha", "8"),
        ("lora_alpha", None),
        ("lora_alpha", 10**400),
        ("lora_alpha", [1]),
        ("use_rslora", 1),
        ("rank_pattern", [1]),
        ("rank_pattern", {"q_proj": 3}),
        ("rank_pattern", {"q_proj": "4"}),
        ("rank_pattern", {"(a|b)*q_proj": 4}),
        ("alpha_pattern", {"q_proj": None}),
        ("alpha_pattern", {"(a+)+b": 1}),
        ("peft_type", "ADALORA"),
        ("peft_type", None),
        ("peft_type", {}),
    ],
)
def test_field_that_cannot_be_served_is_refused_by_name(
    golden: Any, field: str, value: object
) -> None:
    case = golden.edit_config(golden.copy("lora"), **{field: value})
    with pytest.raises(AdapterRejected) as caught:
        golden.read(case)
    assert field.split("_")[0] in f"{caught.value}"


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "orthogonal", "eva", "mica"])
def test_initialisations_that_keep_the_base_are_served(golden: Any, init: object) -> None:
    case = golden.edit_config(golden.copy("lora"), init_lora_weights=init, unknown_field={"a": 1})
    golden.assert_delta(golden.read(case), "lora")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (f"{Q0}.lora_C.weight", (4, 4), "is not a tensor of a lora adapter"),
        (f"{Q0}.lora_diag", (4,), "KaSA"),
        (f"{Q0}.bias", (16,), "biases"),
        (f"{Q0}.base_layer.bias", (16,), "biases"),
        (f"{Q0}.lora_A", (4, 16), "also given as"),
        (f"{Q0}.lora_A.default.weight", (4, 16), "is not a tensor of a lora adapter"),
        ("base_model.model.lm_head.lora_A.weight", (4, 16), "output head"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", (4, 32), "embeddings"),
        ("base_model.model.model.norm.lora_A.weight", (4, 16), "normalisation"),
        (Q0.replace("0", "2") + ".lora_A.weight", (4, 16), "has layers 0 to 1"),
        (Q0.replace("0", "00") + ".lora_A.weight", (4, 16), "must belong to one of"),
        (Q0.replace("0", "٠") + ".lora_A.weight", (4, 16), "must belong to one of"),
        (Q0.replace("self_attn", "mlp") + ".lora_A.weight", (4, 16), "must belong to one of"),
        (Q0.replace("q_proj", "qkv_proj") + ".lora_A.weight", (4, 16), "must belong to one of"),
        (Q0.removeprefix("base_model.model.") + ".lora_A", (4, 16), "must belong to one of"),
        ("x", (1,), "is not a tensor of a lora adapter"),
    ],
)
def test_unknown_or_misplaced_tensor_is_refused_by_name(
    golden: Any, name: str, shape: tuple[int, ...], message: str
) -> None:
    case = golden.copy("lora")
    golden.save(case, golden.tensors(case) | {name: torch.zeros(shape)})
    with pytest.raises(AdapterRejected, match=message) as caught:
        golden.read(case)
    assert caught.value.where.isprintable()
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (f"{Q0}.lora_A.weight", (4, 8), r"lora_A\.weight: shape \[4, 8\] must be \[4, 16\]"),
        (f"{Q0}.lora_A.weight", (4, 16, 1), "must have two axes"),
        (f"{Q0}.lora_B.weight", (16, 3), r"lora_B\.weight: shape \[16, 3\] must be \[16, 4\]"),
        (f"{Q0}.lora_B.weight", None, r"q_proj\.lora_B: is missing"),
        (f"{Q0}.lora_A.weight", None, r"q_proj\.lora_A: is missing"),
    ],
)
def test_wrong_or_missing_factor_is_refused_by_name(
    golden: Any, name: str, shape: tuple[int, ...] | None, message: str
) -> None:
    case = golden.copy("lora")
    tensors = golden.tensors(case)
    del tensors[name]
    golden.save(case, tensors if shape is None else tensors | {name: torch.zeros(shape)})
    with pytest.raises(AdapterRejected, match=message):
        golden.read(case)


def test_scale_that_overflows_is_refused(golden: Any) -> None:
    with pytest.raises(AdapterRejected, match=r"layers\.0\.q_proj: scale .* overflows"):
        golden.read(golden.edit_config(golden.copy("lora"), lora_alpha=1e300))


def test_what_is_written_is_read_back(golden: Any) -> None:
    dims = golden.shape.dims
    ab = {
        t: (torch.randn(3, dims[t.module].d_in), torch.randn(dims[t.module].d_out, 3).T.mT)
        for t in golden.shape.targets()
        if t.layer == 1
    }
    write_lora(golden.folder / "out", ab, alpha=4.5, rank=3, shape=golden.shape)
    weights = golden.read(golden.folder / "out")
    assert set(weights.tensors) == set(ab)
    assert set(weights.scales.values()) == {1.5}
    for target, parts in ab.items():
        assert all(map(torch.equal, weights.tensors[target], parts))


def test_layout_is_that_of_peft(golden: Any) -> None:
    peft = golden.copy("lora")
    weights = golden.read(peft)
    write_lora(golden.folder / "out", weights.tensors, alpha=6, rank=4, shape=golden.shape)
    ours, theirs = golden.tensors(golden.folder / "out"), golden.tensors(peft)
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert to_record(golden.read(golden.folder / "out")) == to_record(weights)


PATHS = [f"model.layers.{n}.{m}" for n in (0, 1, 11) for m in ("self_attn.q_proj", "mlp.up_proj")]


@pytest.mark.parametrize(
    "text",
    [
        "q_proj", "proj", "self_attn.q_proj", "layers.1.self_attn.q_proj", "layers.1", "",
        "model.layers.1.self_attn.q_proj", "^model.layers.1.mlp.up_proj", "^q_proj", ".*",
        r"layers\.\d+\.mlp\.up_proj", r"layers\.\d\.mlp\.up_proj", "layers.[0-9]+.mlp.[a-z]+_proj",
        "m?l?p?.up_proj", "[qu]p?_proj", "self.attn.q.proj", r"^.*\.q_proj", "x*q_proj", ".+_proj",
    ],
)  # fmt: skip
def test_patterns_match_as_in_peft(text: str) -> None:
    pattern = parse_pattern(text)
    assert pattern is not None
    for path in PATHS:
        assert pattern.matches(path) == bool(re.match(rf"(.*\.)?({text})$", path)), path


@given(st.text("ab.*+?[]-^d\\_", max_size=8), st.text("ab.d_-", max_size=8))
def test_every_accepted_pattern_means_what_it_means_to_re(text: str, path: str) -> None:
    pattern = parse_pattern(text)
    if pattern is not None:
        assert pattern.matches(path) == bool(re.match(rf"(.*\.)?({text})$", path))


NAMES = st.sampled_from(["q_proj", "layers.1.self_attn.q_proj", r"layers\.\d+\.mlp.*", "^x", "1.*"])


@given(
    rank=st.integers(1, 9),
    alpha=st.integers(0, 64) | st.floats(0.1, 100),
    rslora=st.booleans(),
    ranks=st.dictionaries(NAMES, st.integers(1, 9), max_size=2),
    alphas=st.dictionaries(NAMES, st.integers(1, 64), max_size=2),
)
def test_scale_is_pefts_or_there_is_none(
    rank: int, alpha: float, rslora: bool, ranks: dict[str, int], alphas: dict[str, int]
) -> None:
    config = {"r": rank, "lora_alpha": alpha, "use_rslora": rslora}
    scaling = LoraScaling(config | {"rank_pattern": ranks, "alpha_pattern": alphas})

    def outcome(path: str, rank: int) -> float | None:
        try:
            return scaling.scale(path, rank, "x")
        except AdapterRejected:
            return None

    def matching(keys: Iterable[str], path: str) -> list[str]:
        return [key for key in keys if re.match(rf"(.*\.)?({key})$", path)]

    for path in PATHS:
        theirs = ranks.get(get_pattern_key(ranks, path), rank)
        numerator = alphas.get(get_pattern_key(alphas, path), alpha)
        scale = numerator / math.sqrt(theirs) if rslora else numerator / theirs
        unclear = len({alphas[key] for key in matching(alphas, path)}) > 1
        assert outcome(path, theirs) == (None if unclear else scale)
        if len(matching(ranks, path)) < 2:  # else saving has lost which one was meant
            assert all(outcome(path, other) is None for other in range(10) if other != theirs)


@pytest.mark.parametrize(
    "text", ["(a+)+", "a{2}", "a|b", "[^a]", r"\w", "a$", "a" * 129, "[a", "*"]
)
def test_other_syntax_is_not_guessed(text: str) -> None:
    assert parse_pattern(text) is None
