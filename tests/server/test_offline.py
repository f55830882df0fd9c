"""The engine of the offline benchmarks: what it builds is what it says it measures."""

import pytest
import torch

from shoal.loadtests.driver import Bench, Case
from shoal.server.model.device_runner import DeviceRunner
from shoal.server.model.runner import ModelRunner
from shoal.server.offline import DoesNotFit, OfflineConfig, OfflineEngine, _random_basis
from shoal.server.offline_uploads import Uploads
from shoal.server.profiling import part_of


def engine(family: str = "core", *, fused: bool | None = None, **changes: object) -> OfflineEngine:
    settings: dict[str, object] = {
        "model_shape": "tiny",
        "device": "cpu",
        "fused": fused,
        "family": family,
        "rank": 8,
        "resident": 40,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "workloads": ((6, 40),),
        **changes,
    }
    return OfflineEngine(OfflineConfig(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["core", "fold", "lora"])
def test_the_fused_engine_gives_the_tokens_of_the_plain_one(family: str) -> None:
    case = Case(6, 20, 8)
    fused, plain = engine(family, fused=True), engine(family, fused=False)
    assert isinstance(fused.runner, DeviceRunner)
    assert isinstance(plain.runner, ModelRunner)
    for adapters in (0, 3):
        tokens = [Bench(e, seed=0).outcome(case, adapters).tokens for e in (fused, plain)]
        assert tokens[0] == tokens[1]


def test_the_base_of_the_fused_engine_has_no_bank_and_no_basis() -> None:
    made = engine(fused=True)
    assert isinstance(made.base_runner, DeviceRunner)
    assert made.base_runner.forward.basis_rows is None
    assert made.base_runner is not made.runner
    alone = engine(fused=True, resident=0)
    assert alone.base_runner is alone.runner


def test_the_rows_behind_the_weights_are_the_basis_times_the_weights() -> None:
    made = engine(fused=True)
    basis = _random_basis(made.shape, made.config.basis_rank, made.device)
    linear = made.decoder.layers[1].down
    target = next(t for t in basis.factors if (t.layer, t.module) == (1, "down_proj"))
    expected = basis.factors[target][:, :32].T @ linear.weight
    n = linear.weight.shape[0]
    torch.testing.assert_close(linear.widened[n : n + 32], expected)  # type: ignore[index]


def test_residents_lie_in_different_places_that_fill_the_bank() -> None:
    made = engine("lora")
    slots = [made.slots.acquire(spec) for spec in made.adapters]
    units = {placed[0].unit for placed in slots if placed is not None and not placed[1]}
    assert len(units) == 40
    assert made.slots.acquire(made.adapters[0]) is not None


def test_bytes_of_the_8b_shape() -> None:
    made = engine()
    weights = sum(p.numel() for p in made.decoder.parameters()) - made.decoder.embed.numel()
    norms = (2 * made.model.num_layers + 1) * made.model.hidden_size
    assert made.weight_bytes == 4 * (weights - norms)
    assert made.position_bytes == 4 * 2 * 2 * 2 * 16  # float32, k and v, layers, heads, head_dim
    assert made.adapter_bytes(0) == 0
    record = 4 * 2 * 7 * 8 * 8
    assert made.adapter_bytes(3) - made.adapter_bytes(1) == 2 * record


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(DoesNotFit, match="1000000000 adapters"):
        engine(resident=1_000_000_000)


def test_the_cache_holds_the_largest_workload_not_the_product_of_the_largest_parts() -> None:
    wide, long = ((8, 16),), ((1, 900),)
    blocks = [engine(workloads=w)._num_blocks for w in (wide, long, wide + long)]
    assert blocks[2] == max(blocks[:2])


def test_uploads_take_turns_in_the_spare_places_and_leave_them_free() -> None:
    made = engine(spare=2)
    free = made.slots.num_units
    residents = made.slots.num_resident
    with Uploads(made, per_minute=60_000) as uploads:
        seen = set()
        while uploads.count < 5:
            seen |= {load.adapter.slot.unit for load in uploads.take()}
        assert made.slots.num_resident <= residents + 2
    assert len(seen) == 2
    assert max(seen) < free
    assert made.slots.num_resident == residents
    assert all(made.slots.resident(spec.digest) for spec in made.adapters)
    made.slots.check()
    made.host.check()


def test_what_an_upload_raises_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(spare=2)

    def refuse(*_: object, **__: object) -> None:
        raise MemoryError("no page-locked memory")

    monkeypatch.setattr(made.host, "put", refuse)
    uploads = Uploads(made, per_minute=60_000)
    with pytest.raises(MemoryError, match="page-locked"), uploads:
        uploads._thread.join()


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "gemm"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "gemm"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention"),
        ("attention_decode_kernel", "attention"),
        ("core_apply_kernel", "adapters"),
        ("core_mix_rows_kernel", "adapters"),
        ("shrink_kernel", "adapters"),
        ("fold_sum_kernel", "adapters"),
        ("sample_scan_kernel", "sampling"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("rope_kv_kernel", "elementwise"),
        ("add_residual_kernel", "elementwise"),
        ("void at::native::vectorized_elementwise_kernel<4, silu>", "elementwise"),
    ],
)
def test_kernels_are_sorted_by_name(kernel: str, part: str) -> None:
    assert part_of(kernel) == part
