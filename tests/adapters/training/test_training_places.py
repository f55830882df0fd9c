"""The run directory when things go wrong: in use, not writable, full, left by a killed process."""

import errno
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest

from shoal.adapters.training import checkpoint
from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.errors import Diverged, OptionRejected, RunDirectoryError
from shoal.adapters.training.lanes import Lane
from shoal.adapters.training.metrics import StepMetrics, read_evals, read_steps
from shoal.adapters.training.rundir import RunDirectory, claimed
from shoal.adapters.training.trainer import TrainResult
from shoal.server.__main__ import main


class Lab(Protocol):
    """The fixture of this folder's conftest.py."""

    base: Path
    data: Path
    root: Path

    def config(self, name: str, **options: Any) -> TrainConfig: ...
    def train(self, name: str, on_step: Any = None, **options: Any) -> TrainResult: ...
    def train_lanes(
        self, name: str, lanes: list[Lane], on_step: Any = None, **options: Any
    ) -> list[TrainResult]: ...


def interrupt_after(last: int) -> Callable[[StepMetrics], None]:
    sent: list[int] = []

    def on_step(done: StepMetrics) -> None:
        if done.step == last and not sent:  # once, of however many lanes
            sent.append(last)
            signal.raise_signal(signal.SIGTERM)

    return on_step


def command(lab: Lab, *options: str) -> list[str]:
    paths = ["--base", str(lab.base), "--data", str(lab.data), "--out", str(lab.root / "run")]
    return ["train", "--method", "lora-xs", *paths, "--rank", "4", "--device", "cpu", *options]


CLAIM = """
import pathlib, sys
from shoal.adapters.training.rundir import claimed
with claimed(pathlib.Path(sys.argv[1])):
    print("mine")
"""


def test_a_directory_is_of_one_process_at_a_time(tmp_path: Path) -> None:
    def ask() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", CLAIM, str(tmp_path / "run")]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    with claimed(tmp_path / "run"):
        refused = ask()
    assert "is in use by another process" in refused.stderr
    assert ask().stdout == "mine\n"


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_in_progress_is_left_alone(resume: bool, lab: Lab) -> None:
    if resume:
        lab.train("run", interrupt_after(1))
    with (
        claimed(lab.root / "run"),
        pytest.raises(RunDirectoryError, match="is in use by another process"),
    ):
        lab.train("run", resume=resume)
    names = {path.name for path in (lab.root / "run").iterdir()}
    assert ("metrics.jsonl" in names) == resume


def test_what_came_into_the_directory_meanwhile_is_not_replaced(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run may have begun and ended there while this one loaded its base."""
    checks: list[None] = []
    check = RunDirectory.check

    def then_another(self: RunDirectory, **options: bool) -> None:
        check(self, **options)
        if not checks:
            (lab.root / "run").mkdir()
            (lab.root / "run/adapter_model.safetensors").write_text("theirs")
        checks.append(None)

    monkeypatch.setattr(RunDirectory, "check", then_another)
    with pytest.raises(RunDirectoryError, match="is not empty"):
        lab.train("run")
    assert (lab.root / "run/adapter_model.safetensors").read_text() == "theirs"


def test_a_place_that_allows_no_new_files_is_refused_before_the_base_is_loaded(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    (lab.root / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="allows no new files"):
        lab.train("file/below", base=lab.root / "nowhere")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(RunDirectoryError, match="allows no new files"):
        lab.train("new", base=lab.root / "nowhere")


def test_a_full_disk_ends_the_run_in_a_line_and_loses_no_checkpoint(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--steps", "6", "--save-every", "2", "--batch-size", "2")
    write = checkpoint.write_atomically
    written: list[Path] = []

    def full_after_two(path: Path, chunks: Any) -> None:
        written.append(path)
        if len(written) > 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, chunks)

    monkeypatch.setattr(checkpoint, "write_atomically", full_after_two)
    assert main(command(lab, *options)) == 1
    said = capsys.readouterr().err
    assert "shoal train: [Errno 28] No space left on device" in said
    assert "--resume" in said
    monkeypatch.undo()
    assert main(command(lab, *options, "--resume")) == 0
    lab.train("whole", steps=6)
    mine, whole = lab.root / "run", lab.root / "whole"
    assert [s.loss for s in read_steps(mine / "metrics.jsonl")] == [
        s.loss for s in read_steps(whole / "metrics.jsonl")
    ]
    name = "adapter_model.safetensors"
    assert (mine / name).read_bytes() == (whole / name).read_bytes()


def test_a_crash_loses_no_more_steps_than_lie_between_checkpoints(lab: Lab) -> None:
    def die(done: StepMetrics) -> None:
        if done.step == 5:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        lab.train("run", die, save_every=2)
    seen: list[int] = []
    lab.train("run", lambda done: seen.append(done.step), save_every=2, resume=True)
    assert seen == [5, 6]


def test_a_run_that_dies_in_its_first_step_can_be_resumed(lab: Lab) -> None:
    def die(done: StepMetrics) -> None:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        lab.train("run", die)
    lab.train("run", resume=True)
    lab.train("whole")
    name = "adapter_model.safetensors"
    mine, whole = lab.root / "run", lab.root / "whole"
    assert (mine / name).read_bytes() == (whole / name).read_bytes()
    assert [s.step for s in read_steps(mine / "metrics.jsonl")] == list(range(1, 7))


def test_a_lane_that_diverges_after_an_interruption_keeps_no_adapter(lab: Lab) -> None:
    lanes = [Lane("good", 1), Lane("bad", 2, lr=1e30)]
    # The first rate is a sixth of the peak, and large all the same.
    lab.train_lanes("run", lanes, interrupt_after(1), method="lora", steps=8)
    assert (lab.root / "run/bad/adapter_model.safetensors").is_file()
    results = lab.train_lanes("run", lanes, method="lora", steps=8, resume=True)
    assert [result.fate for result in results] == ["finished", "diverged"]
    assert not list((lab.root / "run/bad").glob("adapter_*"))
    assert (lab.root / "run/good/adapter_model.safetensors").is_file()

    lab.train("alone", interrupt_after(1), method="lora", steps=8, lr=1e30)
    with pytest.raises(Diverged):
        lab.train("alone", method="lora", steps=8, lr=1e30, resume=True)
    assert not list((lab.root / "alone").glob("adapter_*"))


def test_half_written_files_of_a_killed_process_are_removed(lab: Lab) -> None:
    lab.train("run", interrupt_after(2))
    torn = [
        lab.root / "run/checkpoint/.state.safetensors.x_1a2b31",
        lab.root / "run/.adapter_model.safetensors.x_1a2b32",
        lab.root / "run/.training.json.x_1a2b33",
    ]
    for path in torn:
        path.write_bytes(b"half")
    edited = lab.root / "run/.training.json.swp"
    edited.write_text("somebody looks at it")
    lab.train("run", resume=True)
    assert not any(path.exists() for path in torn)
    assert edited.exists()


def test_logs_torn_by_a_power_cut_are_written_again(lab: Lab) -> None:
    lab.train("run", interrupt_after(3), eval_data=lab.data, eval_every=1)
    for name in ("metrics.jsonl", "eval.jsonl"):
        with (lab.root / "run" / name).open("ab") as file:
            file.write(b"\0" * 64 + b"\n" + b'{"step": 99, "loss": 1.0}\n' + b'{"st')
    lab.train("run", resume=True, eval_data=lab.data, eval_every=1)
    assert [s.step for s in read_steps(lab.root / "run/metrics.jsonl")] == list(range(1, 7))
    assert [e.step for e in read_evals(lab.root / "run/eval.jsonl")] == list(range(7))


def test_seeds_are_what_generators_take(lab: Lab) -> None:
    for options in ({"seed": 1 << 63}, {"seeds": (1, 1 << 70)}, {"seed": -1}):
        with pytest.raises(OptionRejected, match=r"below 2\^63"):
            lab.config("run", **options)
    with pytest.raises(OptionRejected, match=r"below 2\^63"):
        lab.config("run", method="vera", projection_seed=1 << 64)
    assert lab.train("run", seed=(1 << 63) - 1, steps=1).finished


def test_a_checkpoint_that_is_not_there_says_what_to_do(lab: Lab) -> None:
    with pytest.raises(RunDirectoryError, match=r"leave --resume out$"):
        lab.train("run", resume=True)
    (lab.root / "run").mkdir()
    (lab.root / "run/training.json").write_text(json.dumps({}))
    with pytest.raises(RunDirectoryError, match="give --overwrite"):
        lab.train("run", resume=True)
