"""The benchmark measures what it says, and goes on where it was."""

import json
from pathlib import Path

import pytest
import torch

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


@pytest.mark.parametrize("method", ["lora-xs", "miss"])
def test_tenants_get_the_same_as_alone_by_its_measure(tmp_path: Path, method: str) -> None:
    options = Options("same", **{**TINY, "steps": 6}, **CPU, method=method)  # type: ignore[arg-type]
    found = bench.same(options, torch.device("cpu"))
    assert found["compared"] == 4
    assert found["weights_differ"] < 1e-3 < 10 * found["weights_moved"]
    assert found["first_gradient_norm_differs_relative"] < 1e-4
