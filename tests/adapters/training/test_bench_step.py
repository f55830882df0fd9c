"""The benchmark of a step: it runs, and its last line says what was measured."""

import json

import pytest

from shoal.adapters.training import bench_step


# PEFT asks transformers something under a name that will go.
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_last_line_has_every_contestant_beside_peft(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = "--base tiny --device cpu --methods lora-xs,svf --rank 4 --batch-size 2 --length 16"
    command = ["bench_step", *options.split(), "--steps", "1", "--rounds", "2", "--lanes", "2"]
    monkeypatch.setattr("sys.argv", command)
    bench_step.main()

    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["name"], row["lanes"]) for row in record["rows"]] == [
        ("peft-lora", 1), ("lora-xs", 2), ("svf", 2)
    ]  # fmt: skip
    assert record["rows"][0]["time_ratio"] == 1.0
    assert all(row["ms"] > 0 and row["time_ratio"] > 0 for row in record["rows"])
    lora_xs = record["rows"][1]
    assert lora_xs["parameters"] == 2 * 7 * 4 * 4
    assert record["setting"]["rank"] == 4
