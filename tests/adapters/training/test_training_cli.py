"""``shoal train``: options in, exit status out."""

import argparse
import signal
from pathlib import Path
from typing import Protocol

import pytest

from shoal.adapters.training import lanes
from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.metrics import JsonLines, StepMetrics
from shoal.server.cli.train import add_arguments, run


class Lab(Protocol):
    """The fixture of this folder's conftest.py."""

    base: Path
    data: Path
    root: Path


def parse(lab: Lab, *options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    paths = ["--base", str(lab.base), "--data", str(lab.data), "--out", str(lab.root / "run")]
    return parser.parse_args(["--method", "lora-xs", *paths, "--device", "cpu", *options])


def test_the_defaults_are_those_of_the_config(lab: Lab) -> None:
    args = parse(lab)
    config = TrainConfig(
        method="lora-xs", base=lab.base, data=lab.data, out=lab.root / "run", device="cpu"
    )
    assert {name: getattr(config, name) for name in vars(args)} == vars(args)


def test_a_run_succeeds_and_leaves_an_adapter(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--steps", "2", "--rank", "4", "--batch-size", "2", "--targets", "q_proj,v_proj")
    assert run(parse(lab, *options, "--eval-data", str(lab.data))) == 0

    written = {path.name for path in (lab.root / "run").iterdir()}
    assert written == {
        "adapter_config.json", "adapter_model.safetensors", "checkpoint", "eval.jsonl", "loss.png",
        "metrics.jsonl", "training.json",
    }  # fmt: skip
    output = capsys.readouterr()
    assert "lora-xs adapter of 64 values" in output.out
    assert "2/2" in output.err  # the progress bar
    assert "evaluating: " in output.err


def test_what_is_refused_is_said_in_one_line_with_status_2(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(parse(lab, "--steps", "0")) == 2
    assert capsys.readouterr().err == "shoal train: steps is 0: must be at least 1\n"
    lab.data.write_text("nonsense\n")
    assert run(parse(lab)) == 2
    assert f"{lab.data}, line 1: is not JSON" in capsys.readouterr().err


def test_an_interrupted_run_says_how_to_go_on(
    lab: Lab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupting(JsonLines):
        def append(self, record: object) -> None:
            assert isinstance(record, StepMetrics)
            super().append(record)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(lanes, "JsonLines", Interrupting)
    assert run(parse(lab, "--steps", "5", "--rank", "4")) == 130
    message = capsys.readouterr().err
    assert "interrupted after step 1 of 5" in message
    assert "--resume goes on from it" in message


def test_seeds_are_trained_side_by_side_into_directories_of_their_own(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--steps", "2", "--rank", "4", "--targets", "q_proj")
    assert run(parse(lab, *options, "--seeds", "3,1")) == 0

    assert {path.name for path in (lab.root / "run").iterdir()} == {
        "checkpoint", "loss.png", "seed-1", "seed-3"
    }  # fmt: skip
    assert "adapter_model.safetensors" in {p.name for p in (lab.root / "run" / "seed-3").iterdir()}
    output = capsys.readouterr().out
    assert [line.split(":")[0] for line in output.splitlines()] == [
        str(lab.root / "run" / name) for name in ("seed-3", "seed-1")
    ]
    assert run(parse(lab, *options, "--seeds", "3,3")) == 2
    with pytest.raises(SystemExit):
        parse(lab, "--seeds", "1,x")
