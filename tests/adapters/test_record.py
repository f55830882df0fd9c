"""The record: equal bytes exactly for equal adapters, and nothing damaged gets through."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shoal.adapters.errors import AdapterError, AdapterRejected
from shoal.adapters.record import from_record, record_digest, to_record
from shoal.adapters.spec import BaseShape, Dims, Family, Target
from shoal.adapters.weights import AdapterWeights

SHAPE = BaseShape(
    name="tiny",
    digest="d" * 64,
    num_layers=12,
    dims={m: Dims(12, 8) for m in ("q_proj", "k_proj", "v_proj", "o_proj")}
    | {"gate_proj": Dims(16, 8), "up_proj": Dims(16, 8), "down_proj": Dims(8, 16)},
)
TARGETS = (Target(2, "q_proj"), Target(10, "down_proj"), Target(2, "gate_proj"))


def make(family: Family, dtype: torch.dtype = torch.float32, seed: int = 0) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    tensors: dict[Target, tuple[Tensor, ...]] = {}
    for rank, target in enumerate(TARGETS, start=1):
        dims = SHAPE.dims[target.module]
        tensors[target] = {
            "core": lambda r=rank: (draw(r, r),),
            "fold": lambda r=rank, d=dims: (draw(r, d.d_out),),
            "lora": lambda r=rank, d=dims: (draw(r, d.d_in), draw(d.d_out, r)),
        }[family]()
    scales = {target: 0.1 * n for n, target in enumerate(TARGETS)}
    return AdapterWeights("f", family, tensors, scales, "b" * 64 if family == "core" else None)


@pytest.mark.parametrize("family", ["core", "fold", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip_is_identical(family: Family, dtype: torch.dtype) -> None:
    weights = make(family, dtype)
    data = to_record(weights)
    again = from_record(data, SHAPE)
    assert to_record(again) == data
    assert again.scales == weights.scales
    assert (again.format, again.family, again.basis_id) == ("f", family, weights.basis_id)
    assert set(again.tensors) == set(weights.tensors)
    for target, parts in weights.tensors.items():
        for one, two in zip(parts, again.tensors[target], strict=True):
            assert one.dtype == two.dtype
            assert torch.equal(one, two)


def test_order_and_strides_do_not_change_the_digest() -> None:
    weights = make("lora")
    other = dataclasses.replace(
        weights,
        tensors={
            target: tuple(part.T.contiguous().T for part in weights.tensors[target])
            for target in reversed(TARGETS)
        },
        scales=dict(reversed(weights.scales.items())),
    )
    assert to_record(other) == to_record(weights)


def test_every_change_of_content_changes_the_digest() -> None:
    weights = make("core")
    digests = {record_digest(to_record(weights))}
    bits = weights.tensors[TARGETS[1]][0].clone().view(torch.int32)
    bits[1, 1] ^= 1
    changed = {**weights.tensors, TARGETS[1]: (bits.view(torch.float32),)}
    fewer = {target: weights.tensors[target] for target in TARGETS[:2]}
    half = {t: (parts[0].half(),) for t, parts in weights.tensors.items()}
    scales = {**weights.scales, TARGETS[2]: weights.scales[TARGETS[2]] * (1 + 2**-52)}
    for other in (
        dataclasses.replace(weights, tensors=changed),
        dataclasses.replace(weights, tensors=fewer),
        dataclasses.replace(weights, tensors=half),
        dataclasses.replace(weights, scales=scales),
        dataclasses.replace(weights, basis_id="c" * 64),
        dataclasses.replace(weights, format="g"),
    ):
        digests.add(record_digest(to_record(other)))
    assert len(digests) == 7


def test_record_of_a_larger_base_is_refused_naming_the_tensor() -> None:
    data = to_record(make("fold"))
    small = dataclasses.replace(SHAPE, num_layers=10)
    with pytest.raises(AdapterRejected, match=r"layers\.10\.down_proj\.D"):
        from_record(data, small)
    wide = dataclasses.replace(SHAPE, dims={**SHAPE.dims, "q_proj": Dims(13, 8)})
    with pytest.raises(AdapterRejected, match=r"layers\.2\.q_proj\.D: shape \[1, 12\]"):
        from_record(data, wide)


RECORDS = [to_record(make(family)) for family in ("core", "fold", "lora")]  # type: ignore[arg-type]


@given(
    record=st.sampled_from(RECORDS),
    cut=st.integers(0, 4000),
    edits=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=3),
)
def test_damaged_record_is_an_adapter_error(
    record: bytes, cut: int, edits: list[tuple[int, int]]
) -> None:
    data = bytearray(record[: len(record) - cut] if cut < 50 else record)
    for position, value in edits:
        data[position % len(data)] = value
    try:
        again = from_record(bytes(data), SHAPE)
    except AdapterError:
        return
    assert to_record(again)


def test_metadata_of_the_wrong_kind_is_refused() -> None:
    data = RECORDS[0]
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    config = json.loads(header["__metadata__"]["shoal"])
    for key, value in [
        ("version", 2),
        ("family", "merged"),
        ("family", []),
        ("basis_id", None),
        ("format", 1),
        ("scales", {}),
        ("scales", dict.fromkeys(config["scales"], 10**400)),
        ("scales", dict.fromkeys(config["scales"], True)),
    ]:
        header["__metadata__"]["shoal"] = json.dumps(config | {key: value})
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with pytest.raises(AdapterRejected, match="record"):
            from_record(len(text).to_bytes(8, "little") + text + data[8 + length :], SHAPE)
