"""Runs in processes of their own: killed and resumed, and several that train together."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from safetensors.torch import load_file

from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.errors import BaseRejected, OptionRejected
from shoal.adapters.training.lanes import Lane
from shoal.adapters.training.metrics import read_evals, read_steps
from shoal.adapters.training.trainer import TrainResult
from shoal.adapters.training.world import World


class Lab(Protocol):
    """The fixture of this folder's conftest.py."""

    base: Path
    data: Path
    root: Path

    def config(self, name: str, **options: Any) -> TrainConfig: ...
    def train(self, name: str, **options: Any) -> TrainResult: ...
    def train_lanes(self, name: str, lanes: list[Lane], **options: Any) -> list[TrainResult]: ...


SEEDS = [Lane("seed-1", 1), Lane("seed-2", 2)]
KILLED: dict[str, Any] = {
    "steps": 16, "save_every": 2, "eval_every": 3, "patience": 50, "accumulate": 2,
    "weight_decay": 0.1, "lr": 0.05, "seeds": (1, 2),
}  # fmt: skip
TOGETHER: dict[str, Any] = {
    "steps": 6, "batch_size": 4, "accumulate": 2, "eval_every": 3, "lr": 0.05, "seeds": (1, 2),
}  # fmt: skip


def job(what: str, number: int, config: TrainConfig) -> str:
    values = dataclasses.asdict(config)
    plain = {key: str(x) if isinstance(x, Path) else x for key, x in values.items()}
    return json.dumps([what, number, plain])


@pytest.fixture(scope="module")
def processes(module_lab: Lab) -> Lab:
    """Where runs in processes of their own have left what they learnt."""
    config = functools.partial(module_lab.config, eval_data=module_lab.data)
    jobs = [
        job("kill", 7, config("killed", **KILLED)),
        job("together", 2, config("two", **TOGETHER)),
    ]
    script = Path(__file__).with_name("processes.py")
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, str(script), *jobs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr
    return module_lab


def logs(directory: Path) -> tuple[list[tuple[int, float, float]], list[tuple[int, float]]]:
    """What does not depend on the clock."""
    steps = [(s.step, s.loss, s.grad_norm) for s in read_steps(directory / "metrics.jsonl")]
    return steps, [(e.step, e.loss) for e in read_evals(directory / "eval.jsonl")]


def test_a_run_killed_again_and_again_ends_as_if_nothing_had_happened(processes: Lab) -> None:
    killed, whole = processes.root / "killed", processes.root / "whole"
    assert int((killed / "killed").read_text()) >= 1
    processes.train_lanes("whole", SEEDS, eval_data=processes.data, **KILLED)

    for lane in SEEDS:
        assert logs(killed / lane.name) == logs(whole / lane.name)
        name = "adapter_model.safetensors"
        assert (killed / lane.name / name).read_bytes() == (whole / lane.name / name).read_bytes()


def test_two_processes_with_half_a_batch_each_learn_what_one_learns(processes: Lab) -> None:
    processes.train_lanes("one", SEEDS, eval_data=processes.data, **TOGETHER)

    for lane in SEEDS:
        two, one = processes.root / "two" / lane.name, processes.root / "one" / lane.name
        for of_two, of_one in zip(logs(two), logs(one), strict=True):
            assert len(of_two) == len(of_one)
            for a, b in zip(of_two, of_one, strict=True):
                assert a == pytest.approx(b, rel=1e-4)
        ours = load_file(two / "adapter_model.safetensors")
        for key, value in load_file(one / "adapter_model.safetensors").items():
            assert (ours[key] - value).abs().max() <= 1e-5


def test_processes_are_told_apart_by_torchrun_and_share_rows_equally() -> None:
    assert World.of_environment({}) == World()
    environment = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    world = World.of_environment(environment)
    assert (world.rank, world.size, world.local_rank, world.writes) == (3, 4, 1, False)
    assert [World(rank, 2).rows(6) for rank in range(2)] == [slice(0, 3), slice(3, 6)]
    with pytest.raises(OptionRejected, match="batch-size is 6: must be a multiple of the 4"):
        world.rows(6)


def test_a_gpu_that_is_not_there_is_refused(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(BaseRejected, match="this machine has no CUDA device"):
        lab.train("run", device="cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(BaseRejected, match="process 1 needs a GPU of its own: there are 1"):
        lab.train("run", device="cuda", world=World(1, 2, 1))
