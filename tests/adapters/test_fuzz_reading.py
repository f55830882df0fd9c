"""A moment of `fuzz_reading.py`: files mean what the oracle reads in them, whole or changed."""

from pathlib import Path

import pytest
from tests.adapters.fuzz_reading import Example, Fuzzer, packed, run_batch

from shoal.adapters.formats import config_fields


@pytest.fixture
def fuzzer(tmp_path: Path) -> Fuzzer:
    return Fuzzer(tmp_path)


def test_every_case_as_it_is(fuzzer: Fuzzer) -> None:
    for case in fuzzer.cases:
        for max_bases in (4, 0):
            fuzzer.one(Example(case.name, *packed(case.config, case.tensors), max_bases))
    refused = {"lora_bias", "lora_head", "miss_bat"}
    assert fuzzer.counts["compared"] == 2 * (len(fuzzer.cases) - len(refused))
    formats = {name for name in fuzzer.counts if name.startswith("as ")}
    assert len(formats) == 11, formats


def test_changed_files(fuzzer: Fuzzer, tmp_path: Path) -> None:
    assert run_batch(fuzzer, number=0, size=60, keep=tmp_path / "found")
    assert fuzzer.counts["compared"] > 10
    assert sum(fuzzer.refused.values()) > 10


def test_a_wrong_scale_is_found(
    fuzzer: Fuzzer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = config_fields.LoraScaling.scale
    monkeypatch.setattr(config_fields.LoraScaling, "scale", lambda *a: 1.001 * right(*a))
    assert not run_batch(fuzzer, number=0, size=60, keep=tmp_path / "found")
    assert (tmp_path / "found").is_dir()
