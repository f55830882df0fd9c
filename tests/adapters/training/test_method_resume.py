"""Every method's run goes on after an interrupt as if there had been none."""

import signal
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from safetensors.torch import load_file
from tests.adapters.training.method_cases import options_of

from shoal.adapters.training.method_options import METHOD_NAMES
from shoal.adapters.training.metrics import read_steps
from shoal.adapters.training.trainer import OnStep, TrainResult

# Beside the methods as they are by default: where more than factors and moments must be kept.
CASES = (*METHOD_NAMES, "adalora early", "lora-xs random", "pissa exact")


class Lab(Protocol):
    """The fixture of this folder's conftest.py."""

    root: Path

    def train(self, name: str, on_step: OnStep | None = None, **options: Any) -> TrainResult: ...


def interrupt_after_three(done: Any) -> None:
    if done.step == 3:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(name: str, lab: Lab) -> None:
    options = options_of(name) | {"steps": 5}
    lab.train("whole", **options)
    assert lab.train("parts", interrupt_after_three, **options).steps == 3
    assert lab.train("parts", resume=True, **options).finished

    for file in ("adapter_model.safetensors", "checkpoint/state.safetensors"):
        whole, parts = (load_file(lab.root / run / file) for run in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_the_loss_that_is_logged_is_that_of_the_data_alone(lab: Lab) -> None:
    # Neither adapter changes anything before the first update, but one has a penalty.
    for name in ("lora", "adalora"):
        lab.train(name, **options_of(name) | {"steps": 1})
    lora, adalora = (read_steps(lab.root / x / "metrics.jsonl") for x in ("lora", "adalora"))
    assert adalora[0].loss == pytest.approx(lora[0].loss, rel=1e-5)
