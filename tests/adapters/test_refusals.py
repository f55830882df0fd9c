"""Whatever the bytes: an AdapterError, or an adapter that loads; and a refusal leaves nothing."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.adapters.errors import AdapterError, AdapterRejected
from shoal.adapters.record import to_record

CASES = [
    "lora", "lora_patterns", "lora_dora", "lora_pissa", "adalora", "vera", "vera_drawn", "tinylora",
    "miss_mini", "miss_output", "loha", "lokr", "xs_new_key",
]  # fmt: skip
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
# One directory serves all examples: each overwrites the same two files.
FUZZ = settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def header_and_data(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def accepted(golden: Any, case: Path) -> bool:
    """Read it; True when it loads, False on an AdapterError, which must leave no basis behind."""
    before = {basis.id for basis in golden.bases.all()}
    try:
        weights = golden.read(case)
    except AdapterError as error:
        str(error).encode()
        assert {path.stem for path in (golden.folder / "bases").iterdir()} == before
        return False
    to_record(weights)
    for target, parts in weights.tensors.items():
        assert math.isfinite(weights.scales[target])
        assert all(bool(torch.isfinite(part).all()) for part in parts)
    return True


# --------------------------------------------------------------------------- one fault at a time


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "F64"}, "dtype F64 must be one of"),
        ({"dtype": "I64"}, "dtype I64 must be one of"),
        ({"dtype": ["F32"]}, "dtype"),
        ({"shape": [4, -16]}, "shape must be"),
        ({"shape": [4.0, 16]}, "shape must be"),
        ({"shape": [True, 64]}, "shape must be"),
        ({"shape": "64"}, "shape must be"),
        ({"shape": [4, 17]}, "data_offsets span 256 bytes; F32 .4, 17. takes 272"),
        ({"shape": [0, 1 << 40, 1 << 40]}, "shape must be"),
        ({"shape": [1 << 62, 1 << 62]}, "shape must be"),
        ({"shape": [1] * 9}, "shape must be at most 8"),
        ({"data_offsets": [0]}, "data_offsets"),
        ({"data_offsets": [256, 0]}, "data_offsets span -256 bytes"),
        ({"data_offsets": [1 << 60, (1 << 60) + 256]}, "data_offsets"),
        ({"data_offsets": None}, "data_offsets"),
        ({"extra": 1}, "must hold dtype, shape and data_offsets"),
    ],
)
def test_bad_header_entry_names_its_tensor(
    golden: Any, change: dict[str, Any], message: str
) -> None:
    case = golden.copy("lora")
    path = case / "adapter_model.safetensors"
    header, data = header_and_data(path)
    name = f"{Q0}.lora_A.weight"
    path.write_bytes(join(header | {name: header[name] | change}, data))
    with pytest.raises(AdapterRejected, match=message) as caught:
        golden.read(case)
    assert caught.value.where == name


def test_overlapping_tensors_are_refused(golden: Any) -> None:
    case = golden.copy("lora")
    path = case / "adapter_model.safetensors"
    header, data = header_and_data(path)
    one, two = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
    header[two]["data_offsets"] = header[one]["data_offsets"]
    path.write_bytes(join(header, data))
    with pytest.raises(AdapterRejected, match=r"q_proj\.lora_[AB].*overlaps another tensor"):
        golden.read(case)


def test_tensor_given_twice_is_refused(golden: Any) -> None:
    case = golden.copy("lora")
    path = case / "adapter_model.safetensors"
    header, data = header_and_data(path)
    name = f"{Q0}.lora_A.weight"
    text = f'{{"{name}": {json.dumps(header[name])}, {json.dumps(header)[1:]}'.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(AdapterRejected, match=r"q_proj\.lora_A\.weight: the key is given twice"):
        golden.read(case)


def test_unused_bytes_are_refused(golden: Any) -> None:
    case = golden.copy("lora")
    path = case / "adapter_model.safetensors"
    header, data = header_and_data(path)
    path.write_bytes(join(header, data + b"abcd"))
    with pytest.raises(AdapterRejected, match="has 4 bytes that belong to no tensor"):
        golden.read(case)
    last = max(header, key=lambda n: header[n].get("data_offsets", [0])[0])
    del header[last]
    path.write_bytes(join(header, data))
    with pytest.raises(AdapterRejected, match="bytes that belong to no tensor"):
        golden.read(case)


@pytest.mark.parametrize("length", [1 << 30, (1 << 64) - 1, (4 << 20) + 1])
def test_huge_header_is_refused_without_reading_it(golden: Any, length: int) -> None:
    case = golden.copy("lora")
    path = case / "adapter_model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(AdapterRejected, match=f"header is too long: {length} bytes"):
        golden.read(case)


def test_header_longer_than_the_file_is_refused(golden: Any) -> None:
    case = golden.copy("lora")
    path = case / "adapter_model.safetensors"
    path.write_bytes((1 << 20).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(AdapterRejected, match="truncated: its header should be 1048576 bytes"):
        golden.read(case)


@pytest.mark.parametrize("case_name", CASES)
def test_every_truncation_is_refused(golden: Any, case_name: str) -> None:
    case = golden.copy(case_name)
    path = case / "adapter_model.safetensors"
    whole = path.read_bytes()
    for size in [*range(0, 40), *range(40, len(whole), len(whole) // 40), len(whole) - 1]:
        path.write_bytes(whole[:size])
        assert not accepted(golden, case)


@pytest.mark.parametrize("case_name", CASES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_value_that_is_not_finite_is_refused_by_name(
    golden: Any, case_name: str, value: float, dtype: torch.dtype
) -> None:
    case = golden.copy(case_name)
    tensors = {name: tensor.to(dtype) for name, tensor in golden.tensors(case).items()}
    name = sorted(tensors)[len(tensors) // 2]
    tensors[name].view(-1)[-1] = value
    with pytest.raises(AdapterRejected, match="must be finite") as caught:
        golden.read(golden.save(case, tensors))
    assert caught.value.where == name
    assert list((golden.folder / "bases").iterdir()) == []


def test_name_unfit_for_a_message_is_made_fit(golden: Any) -> None:
    case = golden.copy("lora")
    path = case / "adapter_model.safetensors"
    header, data = header_and_data(path)
    first = min((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    for name in ("x" * 100_000, "a\nb\x1b[31m", "\ud800", f"{Q0}.lora_A.weight\n"):
        changed = {name: header[first]} | {n: e for n, e in header.items() if n != first}
        path.write_bytes(join(changed, data))
        with pytest.raises(AdapterRejected) as caught:
            golden.read(case)
        text = str(caught.value)
        text.encode()
        assert text.isprintable()
        assert len(text) < 1000


# ------------------------------------------------------------------------------------- anything


@FUZZ
@given(
    case_name=st.sampled_from(CASES),
    edits=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=4),
    cut=st.one_of(st.just(0), st.integers(0, 1 << 14)),
)
def test_any_damaged_file_loads_or_is_refused(
    golden: Any, case_name: str, edits: list[tuple[int, int]], cut: int
) -> None:
    case = golden.copy(case_name)
    path = case / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    for position, value in edits:
        data[position % len(data)] = value
    path.write_bytes(data[: len(data) - cut % len(data)])
    accepted(golden, case)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, 4, -1, 10**400, 1 << 63])
    | st.floats(allow_nan=True)
    | st.text(max_size=6)
    | st.sampled_from(["LORA", "MISS", "LORA_XS", "BONE", "mini", "bat", "F32", "BF16", "pissa"])
    | st.sampled_from(["LOHA", "LOKR", "output"])
    | st.sampled_from([{"method": "milora"}, {"method": "olora", "r": 2}, "olora", ["q_proj"]]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias",
        "init_weights", "init_lora_weights", "mini_r", "basis", "base_correction", "target_modules",
        "modules_to_save", "use_dora", "fan_in_fan_out", "layer_replication", "init_r", "u",
        "exclude_modules", "layers_to_transform", "weight_tying", "save_projection",
        "projection_prng_key", "projection_seed", "shard", "alpha",
    ]
)  # fmt: skip


@FUZZ
@given(case_name=st.sampled_from(CASES), changes=st.dictionaries(FIELDS, JSON, max_size=3))
def test_any_config_loads_or_is_refused(
    golden: Any, case_name: str, changes: dict[str, Any]
) -> None:
    accepted(golden, golden.edit_config(golden.copy(case_name), **changes))


@FUZZ
@given(
    case_name=st.sampled_from(CASES),
    pick=st.integers(0, 1000),
    change=st.one_of(
        JSON,
        st.fixed_dictionaries(
            {"dtype": JSON | st.just("F16"), "shape": JSON | st.just([4, 16]), "data_offsets": JSON}
        ),
    ),
)
def test_any_header_entry_loads_or_is_refused(
    golden: Any, case_name: str, pick: int, change: object
) -> None:
    case = golden.copy(case_name)
    path = case / "adapter_model.safetensors"
    header, data = header_and_data(path)
    names = sorted(header)
    path.write_bytes(join(header | {names[pick % len(names)]: change}, data))
    accepted(golden, case)


KINDS = st.sampled_from(
    [
        "lora_A.weight", "lora_B.weight", "lora_A", "miss_block", "bone_block", "basis_probe",
        "default_lora_latent_mapping.weight", "lora_latent_mapping.weight", "lora_E", "x.bias",
        "lora_magnitude_vector", "vera_lambda_b", "tinylora_P", "hada_w1_a",
        "hada_t1", "lokr_w1", "lokr_w2_a", "lokr_w2_b",
    ]
)  # fmt: skip
MODULES = st.sampled_from(
    ["0.self_attn.q_proj", "1.mlp.down_proj", "2.mlp.up_proj", "0.mlp.q_proj", "-1.mlp.up_proj"]
)
SIZES = st.lists(st.sampled_from([0, 1, 4, 8, 16, 24]), max_size=3)


@FUZZ
@given(
    case_name=st.sampled_from(CASES),
    added=st.lists(st.tuples(MODULES, KINDS, SIZES), max_size=3),
    dropped=st.lists(st.integers(0, 1000), max_size=3),
)
def test_any_set_of_tensors_loads_or_is_refused(
    golden: Any, case_name: str, added: list[tuple[str, str, list[int]]], dropped: list[int]
) -> None:
    case = golden.copy(case_name)
    tensors = golden.tensors(case)
    for index in dropped:
        if tensors:
            del tensors[sorted(tensors)[index % len(tensors)]]
    for module, kind, size in added:
        tensors[f"base_model.model.model.layers.{module}.{kind}"] = torch.ones(size)
    accepted(golden, golden.save(case, tensors))
