"""The record: equal bytes exactly for equal adapters, and nothing damaged gets through."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shoal.adapters.errors import AdapterError, AdapterRejected
from shoal.adapters.record import from_record, record_digest, to_record
from shoal.adapters.spec import BaseShape, Dims, Family, Target
from shoal.adapters.weights import AdapterWeights, Correction

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
            "spectral": lambda r=rank: (indices(0, 0, 3)[:r], indices(1, 5, 0)[:r], draw(r)),
        }[family]()
    scales = {target: 0.1 * n for n, target in enumerate(TARGETS)}
    basis_id = "b" * 64 if family in ("core", "spectral") else None
    probes = {target: draw(4, 4).half() for target in TARGETS} if family == "spectral" else {}
    return AdapterWeights("f", family, tensors, scales, basis_id, probes=probes)


def indices(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def with_row_scales(dtype: torch.dtype = torch.float32) -> AdapterWeights:
    """Of two of the three targets."""
    g = {target: torch.rand(SHAPE.dims[target.module].d_out).to(dtype) for target in TARGETS[1:]}
    return dataclasses.replace(make("lora", dtype), row_scales=g)


def with_correction(dtype: torch.dtype = torch.float32) -> AdapterWeights:
    correction = Correction(
        "olora", "c" * 64, {TARGETS[1]: 3, TARGETS[0]: 8}, {TARGETS[0]: 0.1, TARGETS[1]: -2.0}
    )
    return dataclasses.replace(make("lora", dtype), correction=correction)


KINDS: dict[str, Callable[[torch.dtype], AdapterWeights]] = {
    "core": partial(make, "core"),
    "fold": partial(make, "fold"),
    "lora": partial(make, "lora"),
    "spectral": partial(make, "spectral"),
    "row scales": with_row_scales,
    "correction": with_correction,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip_is_identical(kind: str, dtype: torch.dtype) -> None:
    weights = KINDS[kind](dtype)
    family = weights.family
    data = to_record(weights)
    again = from_record(data, SHAPE)
    assert to_record(again) == data
    assert again.scales == weights.scales
    assert (again.format, again.family, again.basis_id) == ("f", family, weights.basis_id)
    assert set(again.tensors) == set(weights.tensors)
    assert again.correction == weights.correction
    assert set(again.row_scales) == set(weights.row_scales)
    for target, g in weights.row_scales.items():
        assert again.row_scales[target].dtype == dtype
        assert torch.equal(again.row_scales[target], g)
    assert set(again.probes) == set(weights.probes)
    for target, kept in weights.probes.items():
        assert again.probes[target].dtype == torch.float16
        assert torch.equal(again.probes[target], kept)
    for target, parts in weights.tensors.items():
        for one, two in zip(parts, again.tensors[target], strict=True):
            assert one.dtype == two.dtype
            assert torch.equal(one, two)


def test_the_bytes_of_what_was_stored_before_have_not_changed() -> None:
    """The digests are in registries; the values were computed before version 2 came."""
    q, down = Target(0, "q_proj"), Target(10, "down_proj")
    half = torch.arange(8.0).half()
    a_b = {
        down: (torch.arange(16.0).view(1, 16), half.view(8, 1)),
        q: (half.view(1, 8), torch.arange(12.0).view(12, 1)),
    }
    r = {q: (torch.arange(4.0).view(2, 2),)}
    for weights, digest in (
        (AdapterWeights("lora_xs", "core", r, {q: 0.5}, "b" * 64), "9dff665222e075073b86b3b1c8b2"),
        (
            AdapterWeights("miss", "fold", {down: (half.view(1, 8),)}, {down: 1.0}),
            "ac9440a5b39634ee3f97b3979dfd",
        ),
        (
            AdapterWeights("lora", "lora", a_b, {q: 2.0, down: 1 / 3}),
            "458487bbf73b9fb7009b1f2fa773",
        ),
    ):
        assert record_digest(to_record(weights)).startswith(digest)


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


def test_every_change_of_a_correction_or_a_row_scale_changes_the_digest() -> None:
    corrected, scaled = with_correction(), with_row_scales()
    correction = corrected.correction
    assert correction is not None
    changed = [
        dataclasses.replace(correction, method="pissa"),
        dataclasses.replace(correction, basis_id="d" * 64),
        dataclasses.replace(correction, ranks={**correction.ranks, TARGETS[1]: 2}),
        dataclasses.replace(correction, scales={**correction.scales, TARGETS[1]: 2.0}),
        dataclasses.replace(
            correction, ranks={TARGETS[0]: 8}, scales={TARGETS[0]: correction.scales[TARGETS[0]]}
        ),
    ]
    every = [corrected, make("lora"), scaled]
    every += [dataclasses.replace(corrected, correction=other) for other in changed]
    fewer = {TARGETS[1]: scaled.row_scales[TARGETS[1]]}
    more = {**scaled.row_scales, TARGETS[1]: scaled.row_scales[TARGETS[1]] * 2}
    every += [dataclasses.replace(scaled, row_scales=g) for g in (fewer, more)]
    assert len({record_digest(to_record(weights)) for weights in every}) == len(every) == 10


def test_record_of_a_larger_base_is_refused_naming_the_tensor() -> None:
    data = to_record(make("fold"))
    small = dataclasses.replace(SHAPE, num_layers=10)
    with pytest.raises(AdapterRejected, match=r"layers\.10\.down_proj\.D"):
        from_record(data, small)
    wide = dataclasses.replace(SHAPE, dims={**SHAPE.dims, "q_proj": Dims(13, 8)})
    with pytest.raises(AdapterRejected, match=r"layers\.2\.q_proj\.D: shape \[1, 12\]"):
        from_record(data, wide)


RECORDS = [to_record(kind(torch.float32)) for kind in KINDS.values()]


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


def edited(data: bytes, **changes: object) -> bytes:
    """The record with other values in its JSON; None takes a key away."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    config = json.loads(header["__metadata__"]["shoal"]) | changes
    kept = {key: value for key, value in config.items() if key not in changes or value is not None}
    header["__metadata__"]["shoal"] = json.dumps(kept)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def test_metadata_of_the_wrong_kind_is_refused() -> None:
    scales = {str(target): 1.0 for target in TARGETS}
    for key, value in [
        ("version", 2),
        ("version", 3),
        ("family", "merged"),
        ("family", []),
        ("basis_id", None),
        ("format", 1),
        ("scales", {}),
        ("scales", dict.fromkeys(scales, 10**400)),
        ("scales", dict.fromkeys(scales, True)),
        ("correction", {}),
    ]:
        with pytest.raises(AdapterRejected, match="record"):
            from_record(edited(RECORDS[0], **{key: value}), SHAPE)


def test_a_correction_that_does_not_fit_is_refused() -> None:
    data = to_record(with_correction())
    length = int.from_bytes(data[:8], "little")
    text = json.loads(data[8 : 8 + length])["__metadata__"]["shoal"]
    correction = json.loads(text)["correction"]
    assert from_record(edited(data, correction=correction), SHAPE) is not None
    q = "layers.2.q_proj"
    for change, rule in [
        ({"method": "loftq"}, "method must be one of pissa, milora, olora"),
        ({"method": [1]}, "method must be one of"),
        ({"basis_id": 7}, "basis_id must be a string"),
        ({"ranks": {}, "scales": {}}, "at least one target"),
        ({"ranks": [8]}, "at least one target"),
        ({"ranks": {q: 0}}, f"rank of {q}: must be from 1 to 8"),
        ({"ranks": {q: 9}}, f"rank of {q}: must be from 1 to 8"),
        ({"ranks": {q: True}}, f"rank of {q}: must be from 1 to 8"),
        ({"ranks": {"layers.12.q_proj": 1}}, r"layers\.12\.q_proj: is not a target of tiny"),
        ({"ranks": {"layers.2.lm_head": 1}}, "is not a target of tiny"),
        ({"scales": {q: 1.0}}, "scales must name exactly"),
        ({"scales": dict.fromkeys(correction["scales"], "1")}, "must be a finite number"),
        ({"more": 1}, "must hold basis_id, method, ranks, scales"),
    ]:
        with pytest.raises(AdapterRejected, match=rf"record: correction.*{rule}"):
            from_record(edited(data, correction=correction | change), SHAPE)
    with pytest.raises(AdapterRejected, match="version 2 must be 1"):
        from_record(edited(data, correction=None), SHAPE)
    with pytest.raises(AdapterRejected, match="version 1 must be 2"):
        from_record(edited(data, version=1), SHAPE)
    with pytest.raises(AdapterRejected, match="a core adapter has none"):
        from_record(edited(RECORDS[0], correction=correction), SHAPE)


def test_row_scales_that_do_not_fit_are_refused() -> None:
    weights = with_row_scales()
    target = TARGETS[1]

    def replaced(g: Tensor, at: Target = target) -> bytes:
        scales = {**weights.row_scales, at: g}
        return to_record(dataclasses.replace(weights, row_scales=scales))

    for g in (torch.ones(9), torch.ones(8, 1)):
        with pytest.raises(
            AdapterRejected, match=r"layers\.10\.down_proj\.G: shape .* must be \[8\]"
        ):
            from_record(replaced(g), SHAPE)
    with pytest.raises(AdapterRejected, match=r"down_proj\.G: every value must be finite"):
        from_record(replaced(torch.full((8,), float("inf"))), SHAPE)
    with pytest.raises(AdapterRejected, match=r"down_proj\.G: dtype torch.int32 must be"):
        from_record(replaced(indices(*range(8))), SHAPE)
    with pytest.raises(AdapterRejected, match=r"layers\.1\.q_proj\.A: is missing"):
        from_record(replaced(torch.ones(12), Target(1, "q_proj")), SHAPE)
    both = dataclasses.replace(weights, correction=with_correction().correction)
    with pytest.raises(AdapterRejected, match="both a correction and row scales"):
        from_record(to_record(both), SHAPE)
    fold = dataclasses.replace(make("fold"), row_scales=weights.row_scales)
    with pytest.raises(AdapterRejected, match=r"G: is not a tensor of a fold record"):
        from_record(to_record(fold), SHAPE)


@pytest.mark.parametrize(
    ("parts", "rule"),
    [
        ((indices(0, 8), indices(0, 0), torch.ones(2)), r"\.I: indices must be from 0 to 7"),
        ((indices(-1, 0), indices(0, 0), torch.ones(2)), r"\.I: indices must be from 0 to 7"),
        ((indices(0, 1), indices(0, 8), torch.ones(2)), r"\.J: indices must be from 0 to 7"),
        ((indices(1, 0), indices(0, 1), torch.ones(2)), r"\.I: entries must be sorted"),
        ((indices(1, 1), indices(2, 2), torch.ones(2)), r"\.I: entries must be sorted"),
        ((indices(1, 1), indices(2, 1), torch.ones(2)), r"\.I: entries must be sorted"),
        ((indices(0, 1), indices(0, 1), torch.ones(3)), r"\.M: shape \[3\] must be \[2\]"),
        ((indices(0), indices(0, 1), torch.ones(1)), r"\.J: shape \[2\] must be \[1\]"),
        ((indices(0), indices(0), torch.ones(1, 1)), r"\.M: shape \[1, 1\] must be \[1\]"),
        ((indices(0), torch.ones(1), torch.ones(1)), r"\.J: dtype torch.float32 must be"),
        ((indices(0), indices(0), indices(1)), r"\.M: dtype torch.int32 must be"),
        ((indices(0), indices(0), torch.tensor([float("nan")])), r"\.M: every value must be"),
    ],
)
def test_spectral_entries_that_do_not_fit_are_refused(parts: tuple[Tensor, ...], rule: str) -> None:
    target = Target(3, "down_proj")
    weights = AdapterWeights("svft", "spectral", {target: parts}, {target: 1.0}, "svd")
    with pytest.raises(AdapterRejected, match=rf"layers\.3\.down_proj{rule}"):
        from_record(to_record(weights), SHAPE)


def test_spectral_probes_that_do_not_fit_are_refused() -> None:
    weights = make("spectral")
    q = TARGETS[0]
    fewer = {target: weights.probes[target] for target in TARGETS[1:]}
    one_more = {**weights.probes, Target(1, "q_proj"): weights.probes[q]}
    for probes, rule in [
        (fewer, r"layers\.2\.q_proj\.P: is missing"),
        (one_more, r"layers\.1\.q_proj\.I: is missing"),
        ({**fewer, q: torch.ones(4, 3).half()}, r"q_proj\.P: shape \[4, 3\] must be \[4, 4\]"),
        ({**fewer, q: torch.ones(4, 4)}, r"q_proj\.P: dtype torch.float32 must be torch.float16"),
        ({**fewer, q: torch.full((4, 4), float("nan")).half()}, r"q_proj\.P: every value must be"),
    ]:
        with pytest.raises(AdapterRejected, match=rule):
            from_record(to_record(dataclasses.replace(weights, probes=probes)), SHAPE)
    changed = {**weights.probes, q: -weights.probes[q]}
    other = to_record(dataclasses.replace(weights, probes=changed))
    assert record_digest(other) != record_digest(to_record(weights))
    lora = dataclasses.replace(make("lora"), probes=fewer)
    with pytest.raises(AdapterRejected, match=r"P: is not a tensor of a lora record"):
        from_record(to_record(lora), SHAPE)
