"""The benchmark measures what it says, and goes on where it was."""

import json
from pathlib import Path

import pytest

from shoal.adapters.training.fleet import bench
from shoal.adapters.training.fleet.bench import Options, main

TINY = {"model_shape": "tiny", "tenants": 4, "rank": 4, "length": 16, "steps": 1}
CPU = {"device": "cpu", "dtype": "float32"}


def records(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_all_measurements_are_appended_once_and_failures_are_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = [
        Options("capacity", method="miss", **TINY, **CPU),  # type: ignore[arg-type]
        Options("gradient", **{**TINY, "rank": 999}, **CPU),  # type: ignore[arg-type]
        Options("gradient", **TINY, **CPU),  # type: ignore[arg-type]
        Options("ratio", **TINY, **CPU),  # type: ignore[arg-type]
    ]
    monkeypatch.setattr(bench, "PLANS", plans[:3])
    path = tmp_path / "results.jsonl"
    assert main(["all", "--json", str(path), "--budget-s", "0"]) == 0
    assert not path.exists()
    assert main(["all", "--json", str(path)]) == 1
    fits, fails, gradient = records(path)
    assert fits["trained"] == 4
    assert "error" in fails
    assert float(str(gradient["kernels_share"])) > 0
    monkeypatch.setattr(bench, "PLANS", plans[2:])
    assert main(["all", "--json", str(path)]) == 0
    [*_, ratio] = records(path)
    assert len(records(path)) == 4
    assert float(str(ratio["ratio"])) > 0
