"""The adapters that ship with the repository, and the recipe of their data."""

import json
from pathlib import Path

import pytest
import torch
from platformdirs import user_cache_path

from shoal.adapters.base import base_digest
from shoal.adapters.basis import DEFAULT_RANK, BasisStore, canonical_basis
from shoal.adapters.reading import adapter_files, read_adapter
from shoal.adapters.shipped.recipes.make_data import (
    SYSTEM_PROMPTS,
    VOICES,
    read_entries,
    training_records,
    write,
)
from shoal.adapters.training.data import read_records
from shoal.server.model.pull import MODEL_SHA256, smollm2_path
from shoal.server.model.weights import load_model

SHIPPED = Path(__file__).parents[3] / "adapters" / "shipped" / "smollm2"
NAMES = sorted(path.name for path in SHIPPED.iterdir())


def test_there_is_one_adapter_for_each_voice() -> None:
    assert sorted(VOICES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_adapter_is_small_compact_and_made_for_smollm2(name: str) -> None:
    files = adapter_files(SHIPPED / name)
    config = json.loads(files["adapter_config.json"].read_text())

    assert sorted(path.name for path in (SHIPPED / name).iterdir()) == sorted(files)
    assert sum(path.stat().st_size for path in files.values()) <= 300_000
    assert config["peft_type"] == "LORA_XS"
    assert config["basis"]["base_digest"] == MODEL_SHA256


@pytest.mark.model
def test_shipped_adapters_fit_the_basis_that_this_machine_serves(tmp_path: Path) -> None:
    path = smollm2_path()
    assert path.is_file(), "run `shoal pull smollm2` first"
    decoder = load_model(path, device="cpu", dtype=torch.float32)
    shape = decoder.config.base_shape("smollm2", base_digest(path))
    cache = user_cache_path("shoal") / "bases"
    canonical = canonical_basis(decoder.weight_of, shape, DEFAULT_RANK, cache)
    for name in NAMES:
        weights = read_adapter(
            adapter_files(SHIPPED / name),
            shape=shape,
            weight_of=decoder.weight_of,
            bases=BasisStore(tmp_path),
            canonical=canonical,
            max_bytes=1 << 20,
            max_bases=0,
        )
        assert weights.family == "core"
        assert weights.basis_id == canonical.id
        assert set(weights.tensors) == set(shape.targets())


@pytest.mark.parametrize("voice", VOICES)
def test_the_recipe_gives_records_that_the_trainer_reads(voice: str, tmp_path: Path) -> None:
    entries = read_entries(VOICES[voice])
    records = training_records(entries)
    write(tmp_path / "data.jsonl", records)

    assert len(entries) == len({entry.question for entry in entries}) >= 100
    assert len(read_records(tmp_path / "data.jsonl")) == len(records) > len(entries)
    prompts = {record[0]["content"] for record in records if record[0]["role"] == "system"}
    assert prompts == set(SYSTEM_PROMPTS)
    assert any(len(record) == 4 for record in records)
