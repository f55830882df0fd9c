"""Every format and family against its origin, on a random Llama of awkward sizes: served logits.

Each alone, and all in one batch. What is made, and how it is served: `origins.py`,
`serving_logits.py`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from tests.e2e.origins import CASES, CONFIG, TENSORS, Base
from tests.e2e.serving_logits import Made, make_all, serve, silent, wrong

from shoal.adapters.reading import FORMATS
from shoal.adapters.spec import Family
from shoal.server.config import ServeConfig

pytestmark = [
    pytest.mark.usefixtures("own_cache"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT's, of what it is asked to do here
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

ODD = {
    "hidden_size": 69,
    "intermediate_size": 101,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 22,
}
LENGTH = 24


@pytest.fixture(scope="module")
def odd(make_base: Callable[..., Any], make_adapter: Callable[..., Any]) -> Base:
    tiny = make_base("llama", **ODD)
    return Base(tiny.model, tiny.path, make_adapter)


@pytest.fixture(scope="module")
def made(odd: Base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    return make_all(odd, CASES, tmp_path_factory.mktemp("golden"), LENGTH)


@pytest.fixture(scope="module")
def odd_bfloat16(make_base: Callable[..., Any], make_adapter: Callable[..., Any]) -> Base:
    """Weights that bfloat16 holds exactly; the origins compute with them in float32 and 64."""
    tiny = make_base("llama", dtype=torch.bfloat16, **ODD)
    return Base(tiny.model, tiny.path, make_adapter)


@pytest.fixture(scope="module")
def made_for_bfloat16(
    odd_bfloat16: Base, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Made]:
    return make_all(odd_bfloat16, CASES, tmp_path_factory.mktemp("golden"), LENGTH)


def config(base: Base, folder: Path, **change: Any) -> ServeConfig:
    fields: dict[str, Any] = {
        "model": str(base.path),
        "registry": f"sqlite:///{folder / 'registry.db'}",
        "device": "cpu",
        "kv_cache_memory": 16 << 20,
        "adapter_memory": 64 << 20,
        "max_model_len": 64,
        "block_size": 4,
        "max_num_seqs": 48,
        "max_num_batched_tokens": 128,
    }
    return ServeConfig(**(fields | change))


def test_every_format_family_and_rank_is_among_them(odd: Base, made: dict[str, Made]) -> None:
    kinds = [each.served for each in made.values() if each.served]
    assert {format for format, _ in kinds} == set(FORMATS.names())
    assert {family for _, family in kinds} == set(get_args(Family))
    configs = [json.loads(each.files[CONFIG].read_text()) for each in made.values() if each.served]
    assert {config.get("init_r", config.get("r")) for config in configs} >= {1, 2, 3, 7, 16, 33, 64}
    tensors = load_file(made["adalora"].files[TENSORS])
    assert {len(tensor) for name, tensor in tensors.items() if "lora_A" in name} == {0, 1, 6}
    assert silent(odd, made, 0.05) == {}


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_float32(
    odd: Base,
    made: dict[str, Made],
    fused: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the runner of a CPU, and by that of a GPU with its kernels' references."""
    monkeypatch.setattr("shoal.server.assemble.runs_fused", lambda *_: fused)
    assert wrong(serve(config(odd, tmp_path), made, monkeypatch)) == {}


def test_float32_after_a_restart(
    odd: Base, made: dict[str, Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wrong(serve(config(odd, tmp_path), made, monkeypatch, restart=True)) == {}


def test_bfloat16_files_over_a_float32_base(
    odd: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The origins compute with the same rounded numbers."""
    made = make_all(odd, CASES, tmp_path / "files", LENGTH, torch.bfloat16)
    assert wrong(serve(config(odd, tmp_path), made, monkeypatch)) == {}


def test_float32_files_over_a_bfloat16_base(
    odd_bfloat16: Base,
    made_for_bfloat16: dict[str, Made],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert wrong(serve(config(odd_bfloat16, tmp_path), made_for_bfloat16, monkeypatch)) == {}


def test_computing_in_bfloat16_costs_its_rounding_only(
    odd_bfloat16: Base,
    made_for_bfloat16: dict[str, Made],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = config(odd_bfloat16, tmp_path, dtype="bfloat16")
    served = serve(settings, made_for_bfloat16, monkeypatch)
    assert {name: each.rms for name, each in served.items() if not each.rms <= 0.2} == {}
