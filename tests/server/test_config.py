"""The configuration: one definition of flags, defaults and rules; and how memory is divided."""

import argparse
from dataclasses import fields, replace
from typing import Any

import pytest

from shoal.server.config import (
    EnginePlan,
    MemoryFacts,
    ModelFacts,
    ServeConfig,
    add_arguments,
    from_args,
    parse_bytes,
    plan_engine,
)

GIB = 1 << 30
MODEL = ModelFacts(
    kv_elements_per_token=1024,
    max_model_len=4096,
    checkpoint_dtype="bfloat16",
    adapter_elements=57_344,  # 11 GB in 16 bits for 100,000 of them: an 8B model's
    unit_elements=1024,
)
NOTHING = MemoryFacts(total_bytes=0, free_bytes=0)


def parse(*arguments: str) -> ServeConfig:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    return from_args(parser.parse_args(arguments))


def test_no_arguments_give_the_defaults() -> None:
    assert parse() == ServeConfig()
    assert ServeConfig().model == "smollm2"
    assert (ServeConfig().host, ServeConfig().port) == ("127.0.0.1", 8000)


def test_every_field_is_a_flag_with_help() -> None:
    parser = argparse.ArgumentParser(prog="serve")
    add_arguments(parser)
    known = {action.dest: action for action in parser._actions}
    for spec in fields(ServeConfig):
        assert known[spec.name].help, spec.name
        parser.format_help()


def test_flags_reach_their_fields() -> None:
    config = parse(
        *(
            "base.gguf",
            "--port",
            "0",
            "--api-key",
            "a",
            "--api-key",
            "b",
            "--adapter-memory",
            "4GiB",
        ),
        *("--no-shipped-adapters", "--shutdown-timeout", "1.5", "--served-model-name", "m"),
    )
    assert config == ServeConfig(
        model="base.gguf",
        port=0,
        api_key=("a", "b"),
        adapter_memory=4 * GIB,
        shipped_adapters=False,
        shutdown_timeout=1.5,
        served_model_name="m",
    )


def test_parsing_twice_does_not_share_keys() -> None:
    assert parse("--api-key", "a").api_key == ("a",)
    assert parse().api_key == ()


def test_keys_are_not_printed() -> None:
    assert "hunter2" not in repr(ServeConfig(api_key=("hunter2",)))


@pytest.mark.parametrize(
    ("broken", "flag"),
    [
        ({"port": -1}, "--port"),
        ({"port": 65536}, "--port"),
        ({"model": ""}, "MODEL"),
        ({"dtype": "int8"}, "--dtype"),
        ({"device": "tpu"}, "--device"),
        ({"max_num_seqs": 0}, "--max-num-seqs"),
        ({"max_model_len": 0}, "--max-model-len"),
        ({"max_num_batched_tokens": 255}, "--max-num-batched-tokens"),
        ({"block_size": 0}, "--block-size"),
        ({"block_size": 24}, "--block-size"),
        ({"block_size": 32, "attention": "xformers"}, "--block-size"),
        ({"gpu_memory_utilization": 0.0}, "--gpu-memory-utilization"),
        ({"gpu_memory_utilization": 1.1}, "--gpu-memory-utilization"),
        ({"gpu_memory_utilization": float("nan")}, "--gpu-memory-utilization"),
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size"),
        ({"api_workers": -1}, "--api-workers"),
        ({"shutdown_timeout": -1.0}, "--shutdown-timeout"),
        ({"api_key": ("",)}, "--api-key"),
        ({"served_model_name": ""}, "--served-model-name"),
        ({"max_body_bytes": 0}, "--max-body-bytes"),
        ({"spectral_memory": -1}, "--spectral-memory"),
        ({"upload_helpers": 65}, "--upload-helpers"),
    ],
)
def test_a_broken_field_is_named_with_its_value_and_rule(broken: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=f"^{flag} is .*: must be ") as caught:
        ServeConfig(**broken)
    value = next(iter(broken.values()))
    assert repr(value) in str(caught.value) or flag == "--api-key"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1024", 1024),
        ("4GiB", 4 * GIB),
        ("4g", 4 * GIB),
        ("1.5 KiB", 1536),
        ("500MB", 500_000_000),
        ("7b", 7),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1", "4 parsecs", "1e9", "nan"])
def test_a_size_that_is_none_says_how_to_write_one(text: str) -> None:
    with pytest.raises(ValueError, match="4GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("model", "name"),
    [("smollm2", "smollm2"), ("/m/Llama-3/", "Llama-3"), ("x/y.q8.gguf", "y.q8")],
)
def test_the_bases_name_comes_from_the_model(model: str, name: str) -> None:
    assert ServeConfig(model=model).base_name == name
    assert ServeConfig(model=model, served_model_name="n").base_name == "n"


def test_a_cpu_gets_fixed_sizes_in_float32() -> None:
    plan = plan_engine(ServeConfig(), device="cpu", model=MODEL, memory=NOTHING)
    assert plan == EnginePlan(
        device="cpu",
        dtype="float32",
        block_tokens=16,
        num_blocks=GIB // (1024 * 4 * 16),
        max_model_len=4096,
        arena_bytes=GIB // 2,
    )


def test_cuda_divides_what_is_left_below_the_limit() -> None:
    memory = MemoryFacts(total_bytes=80 * GIB, free_bytes=60 * GIB, reserve_bytes=4 * GIB)
    plan = plan_engine(
        ServeConfig(gpu_memory_utilization=0.5), device="cuda", model=MODEL, memory=memory
    )
    budget = 40 * GIB - 20 * GIB - 4 * GIB
    assert plan.dtype == "bfloat16"
    assert plan.arena_bytes == budget // 4
    assert plan.num_blocks == (budget - budget // 4) // (1024 * 2 * 16)


def test_the_bank_has_room_for_100_000_adapters_and_no_more() -> None:
    memory = MemoryFacts(total_bytes=80 * GIB, free_bytes=64 * GIB, reserve_bytes=3 * GIB)
    plan = plan_engine(ServeConfig(), device="cuda", model=MODEL, memory=memory)
    left = 72 * GIB - 16 * GIB - 3 * GIB
    assert plan.arena_bytes == 100_000 * 57_344 * 2 < left // 4
    assert plan.num_blocks == (left - plan.arena_bytes) // (1024 * 2 * 16)


@pytest.mark.parametrize("name", ["adapter_memory", "kv_cache_memory"])
def test_a_size_given_on_cuda_leaves_the_rest_to_the_other(name: str) -> None:
    memory = MemoryFacts(total_bytes=80 * GIB, free_bytes=80 * GIB)
    change: dict[str, Any] = {name: 8 * GIB}
    plan = plan_engine(ServeConfig(**change), device="cuda", model=MODEL, memory=memory)
    kv_bytes = plan.num_blocks * 1024 * 2 * 16
    arena, kv = (8 * GIB, 64 * GIB) if name == "adapter_memory" else (100_000 * 57_344 * 2, 8 * GIB)
    assert (plan.arena_bytes, kv_bytes) == (arena, kv)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adapter_memory": 70 * GIB, "kv_cache_memory": 10 * GIB}, r"at most 78\.0 GiB"),
        ({"adapter_memory": 71 * GIB}, r"--adapter-memory is 71\.0 GiB: must be less than 70\.0"),
        ({"kv_cache_memory": 79 * GIB}, r"--kv-cache-memory \(79\.0 GiB\)"),
    ],
)
def test_sizes_that_the_card_has_not_are_refused(change: dict[str, Any], words: str) -> None:
    memory = MemoryFacts(total_bytes=80 * GIB, free_bytes=80 * GIB, reserve_bytes=2 * GIB)
    with pytest.raises(ValueError, match=words):
        plan_engine(ServeConfig(**change), device="cuda", model=MODEL, memory=memory)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_bank_without_room_for_anything_is_refused(device: str) -> None:
    memory = MemoryFacts(total_bytes=8 * GIB, free_bytes=8 * GIB)
    config = ServeConfig(adapter_memory=1000)
    with pytest.raises(ValueError, match="--adapter-memory is 1000: must be at least "):
        plan_engine(config, device=device, model=MODEL, memory=memory)


def test_xformers_takes_blocks_of_whole_reads() -> None:
    assert ServeConfig(attention="xformers", block_size=128).block_size == 128
    with pytest.raises(ValueError, match="a multiple of 64 with --attention xformers"):
        ServeConfig(attention="xformers")


def test_given_sizes_are_kept() -> None:
    config = ServeConfig(kv_cache_memory=1 << 26, adapter_memory=1 << 20, max_model_len=512)
    plan = plan_engine(config, device="cpu", model=MODEL, memory=NOTHING)
    assert plan.num_blocks == (1 << 26) // (1024 * 4 * 16)
    assert (plan.arena_bytes, plan.max_model_len) == (1 << 20, 512)


def test_a_cpu_serves_the_length_that_its_default_cache_holds() -> None:
    vast = replace(MODEL, max_model_len=10**9)
    plan = plan_engine(ServeConfig(), device="cpu", model=vast, memory=NOTHING)
    assert plan.max_model_len == plan.num_blocks * 16


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ServeConfig(max_model_len=5000), "--max-model-len is 5000: must be at most 4096"),
        (ServeConfig(kv_cache_memory=1 << 20), "--kv-cache-memory"),
    ],
)
def test_what_cannot_be_is_refused_with_the_flags_to_change(
    config: ServeConfig, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        plan_engine(config, device="cpu", model=MODEL, memory=NOTHING)


def test_a_full_device_is_refused() -> None:
    full = MemoryFacts(total_bytes=8 * GIB, free_bytes=0)
    with pytest.raises(ValueError, match=r"--gpu-memory-utilization is 0\.9: .* 0 blocks"):
        plan_engine(ServeConfig(), device="cuda", model=MODEL, memory=full)


def test_singular_vectors_have_room_on_a_cpu_and_on_cuda_when_asked_for() -> None:
    assert ServeConfig().spectral_bytes("cpu") == GIB
    assert ServeConfig().spectral_bytes("cuda") == 0
    assert ServeConfig(spectral_memory=0).spectral_bytes("cpu") == 0
    assert parse("--spectral-memory", "3GiB").spectral_bytes("cuda") == 3 * GIB


def test_http_has_processes_of_its_own_beside_a_gpu() -> None:
    assert ServeConfig().http_processes("cpu", 64) == 0
    assert [ServeConfig().http_processes("cuda", cores) for cores in (2, 8, 64)] == [1, 2, 4]
    assert ServeConfig(api_workers=0).http_processes("cuda", 64) == 0
    assert ServeConfig(api_workers=3).http_processes("cpu", 1) == 3


def test_upload_helpers_follow_the_machine_unless_they_are_told() -> None:
    by_itself = ServeConfig()
    assert [by_itself.upload_processes(n) for n in (1, 2, 8, 16, 128)] == [1, 1, 2, 5, 8]
    assert ServeConfig(upload_helpers=0).upload_processes(8) == 0
    assert ServeConfig(upload_helpers=7).upload_processes(8) == 7
