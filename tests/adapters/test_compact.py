"""The compact form: the record comes back byte for byte, in fewer bytes, or not at all."""

import contextlib
import json
import os
import random
import zlib

import pytest
import torch

from shoal.adapters.compact import MAGIC, compact, expand
from shoal.adapters.record import to_record
from shoal.adapters.spec import MODULES, Family, Target
from shoal.adapters.weights import AdapterWeights, Correction

SMOLLM2_TARGETS = tuple(Target(layer, module) for layer in range(30) for module in MODULES)


def lora_xs(rank: int, dtype: torch.dtype = torch.float32) -> bytes:
    tensors = {target: (torch.randn(rank, rank).to(dtype),) for target in SMOLLM2_TARGETS}
    scales = dict.fromkeys(tensors, 1 / 3)
    return to_record(AdapterWeights("lora_xs", "core", tensors, scales, "b" * 64))


def mixed(family: Family, dtype: torch.dtype) -> bytes:
    """Another shape and scale for each target, gaps between the layers."""
    tensors = {}
    for n, target in enumerate((Target(2, "q_proj"), Target(3, "q_proj"), Target(11, "o_proj")), 1):
        index = torch.arange(n, dtype=torch.int32)
        tensors[target] = {
            "core": (torch.randn(n, n).to(dtype),),
            "lora": (torch.randn(n, 8).to(dtype), torch.randn(6, n).to(dtype)),
            "spectral": (index, index, torch.randn(n).to(dtype)),
        }[family]
    scales = {target: 1 / (3 + target.layer) for target in tensors}
    basis_id = None if family == "lora" else "b" * 64
    correction = None
    if family == "lora":
        correction = Correction(
            "milora", "c" * 64, {Target(2, "q_proj"): 2}, {Target(2, "q_proj"): 1.5}
        )
    return to_record(AdapterWeights("f", family, tensors, scales, basis_id, {}, correction))


@pytest.mark.parametrize("family", ["core", "lora", "spectral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_record_comes_back_byte_for_byte(family: Family, dtype: torch.dtype) -> None:
    record = mixed(family, dtype)
    small = compact(record)
    assert small is not None
    assert len(small) < len(record)
    assert expand(small) == record


@pytest.mark.parametrize(("rank", "payload"), [(4, 13_440), (16, 215_040)])
def test_the_manifest_is_small_beside_the_smallest_adapters(rank: int, payload: int) -> None:
    record = lora_xs(rank)
    small = compact(record)
    assert small is not None
    assert len(record) - payload > 25_000
    assert len(small) - payload < 200
    assert expand(small) == record


def test_large_tensors_are_not_copied_to_save_a_header() -> None:
    assert compact(lora_xs(64)) is None


def test_what_is_not_a_canonical_record_has_no_compact_form() -> None:
    record = mixed("core", torch.float32)
    begin = 8 + int.from_bytes(record[:8], "little")
    header = json.loads(record[8:begin])
    reordered = json.dumps(dict(reversed(header.items()))).encode()
    without = json.dumps({k: v for k, v in header.items() if k != "__metadata__"}).encode()
    for text in (reordered, without, b"[1]", b"{}", b"\xff", b"[" * 100_000):
        assert compact(len(text).to_bytes(8, "little") + text + record[begin:]) is None
    for data in (b"", b"x", record[: begin - 1], os.urandom(300), MAGIC + record):
        assert compact(data) is None


def test_damage_is_an_error_or_other_bytes_and_never_another_exception() -> None:
    record = mixed("core", torch.float32)
    small = compact(record)
    assert small is not None
    rng = random.Random(0)
    for _ in range(400):
        damaged = bytearray(small)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        for data in (bytes(damaged), small[: rng.randrange(len(small))]):
            with contextlib.suppress(ValueError):
                assert expand(data) != record


@pytest.mark.parametrize(
    "manifest",
    [
        [],
        {},
        None,
        [{}, [[1.0, "q_proj", "0-999999999"]], []],
        [{}, [], [["q_proj.R", "F32", [1], "0-5000"]]],
        [{}, [], [["q_proj.R", "F64", [1], "0"]]],
        [{}, [], [["q_proj.R", "F32", 5, "0"]]],
        [5, [], []],
    ],
)
def test_hostile_manifests_are_refused(manifest: object) -> None:
    text = zlib.compress(json.dumps(manifest).encode())
    with pytest.raises(ValueError, match="manifest is damaged"):
        expand(MAGIC + len(text).to_bytes(4, "little") + text)


def test_a_bomb_is_not_inflated() -> None:
    text = zlib.compress(b" " * (64 << 20))
    with pytest.raises(ValueError, match="cut off or too long"):
        expand(MAGIC + len(text).to_bytes(4, "little") + text)
