"""A known layout packs bit for bit what parsing and packing give, or says that it cannot."""

import pytest
import torch

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.layouts import LAYOUTS_MAX, Layouts
from shoal.adapters.packing import PackedAdapter, pack_adapter
from shoal.adapters.record import from_record, record_digest, to_record
from shoal.adapters.spec import MODULES, BaseShape, Dims, Target
from shoal.adapters.weights import AdapterWeights

SHAPE = BaseShape("tiny", "d" * 64, 12, dict.fromkeys(MODULES, Dims(24, 24)))


def adapter(
    seed: int, *, dtype: torch.dtype = torch.float32, ranks: tuple[int, ...] = (4,), every: int = 1
) -> AdapterWeights:
    """A core adapter on every so many targets, with ranks and scales that differ between them."""
    generator = torch.Generator().manual_seed(seed)
    targets = SHAPE.targets()[::every]
    tensors = {}
    for n, target in enumerate(targets):
        rank = ranks[n % len(ranks)]
        tensors[target] = (torch.randn(rank, rank, generator=generator).to(dtype),)
    scales = {target: 0.3 + n / 7 for n, target in enumerate(targets)}
    return AdapterWeights("lora_xs", "core", tensors, scales, "b" * 64)


def slow(record: bytes, dtype: torch.dtype) -> tuple[AdapterWeights, PackedAdapter]:
    weights = from_record(record, SHAPE)
    return weights, pack_adapter(weights, SHAPE, record_digest(record), dtype)


@pytest.mark.parametrize("ranks", [(4,), (2, 5, 3)])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("packed", [torch.float32, torch.bfloat16])
def test_it_packs_the_same_bits(
    ranks: tuple[int, ...], every: int, stored: torch.dtype, packed: torch.dtype
) -> None:
    layouts = Layouts(SHAPE, packed)
    first, second = (
        to_record(adapter(seed, dtype=stored, ranks=ranks, every=every)) for seed in (0, 1)
    )
    assert layouts.pack(first, record_digest(first)) is None
    layouts.learn(first, *slow(first, packed))
    for record in (first, second):
        got = layouts.pack(record, record_digest(record))
        _, wanted = slow(record, packed)
        assert got is not None
        assert got.spec == wanted.spec
        assert got.data.dtype == packed
        bits = torch.int32 if packed == torch.float32 else torch.int16
        assert torch.equal(got.data.view(bits), wanted.data.view(bits))


def test_another_layout_is_not_known() -> None:
    layouts = Layouts(SHAPE, torch.float32)
    record = to_record(adapter(0))
    layouts.learn(record, *slow(record, torch.float32))
    for other in (adapter(0, every=2), adapter(0, ranks=(2,)), adapter(0, dtype=torch.float16)):
        data = to_record(other)
        assert layouts.pack(data, record_digest(data)) is None


def test_what_is_not_finite_is_refused_as_by_the_parser() -> None:
    layouts = Layouts(SHAPE, torch.float16)
    record = to_record(adapter(0))
    layouts.learn(record, *slow(record, torch.float16))
    for bad, said in ((float("nan"), "finite"), (float("inf"), "finite"), (1e30, "overflow")):
        weights = adapter(1)
        weights.tensors[Target(3, "up_proj")][0][1, 2] = bad
        data = to_record(weights)
        with pytest.raises(AdapterRejected, match=said):
            layouts.pack(data, record_digest(data))


def test_only_plain_core_adapters_are_learnt_and_only_so_many() -> None:
    layouts = Layouts(SHAPE, torch.float32)
    mixed = adapter(0)
    tensors = dict(mixed.tensors) | {Target(0, "q_proj"): (torch.ones(4, 4, dtype=torch.float16),)}
    lora = AdapterWeights(
        "lora", "lora", {Target(0, "q_proj"): (torch.ones(2, 24), torch.ones(24, 2))},
        {Target(0, "q_proj"): 1.0},
    )  # fmt: skip
    for weights in (AdapterWeights("lora_xs", "core", tensors, mixed.scales, "b" * 64), lora):
        record = to_record(weights)
        layouts.learn(record, *slow(record, torch.float32))
        assert layouts.pack(record, record_digest(record)) is None
    records = [to_record(adapter(0, ranks=(n,))) for n in range(1, LAYOUTS_MAX + 2)]
    for record in records:
        layouts.learn(record, *slow(record, torch.float32))
    known = [layouts.pack(record, record_digest(record)) is not None for record in records]
    assert known == [False] + [True] * LAYOUTS_MAX
