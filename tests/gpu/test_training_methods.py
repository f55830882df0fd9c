"""Every training method on CUDA learns what it learns on a CPU."""

from pathlib import Path

import pytest
import torch
from tests.adapters.training.conftest import base, tokenizer
from tests.adapters.training.method_cases import CASES, Trial

__all__ = ["base", "tokenizer"]

DEVICE = "cuda"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("name", CASES)
def test_a_few_steps_are_those_of_a_cpu(name: str, base: Path, cache: Path) -> None:
    on_cpu = Trial(base, cache, name, (1, 2))
    on_cuda = Trial(base, cache, name, (1, 2), device=DEVICE)
    for trial in (on_cpu, on_cuda):
        trial.train(3)

    first, *later = on_cuda.losses
    torch.testing.assert_close(first.cpu(), on_cpu.losses[0], atol=1e-5, rtol=1e-5)
    for mine, expected in zip(later, on_cpu.losses[1:], strict=True):
        # AdamW's first steps go by the signs of gradients, also of those that are almost zero.
        torch.testing.assert_close(mine.cpu(), expected, atol=0, rtol=2e-2)
    assert all(
        factor.is_cuda for linear in on_cuda.adapted.values() for factor in linear.parameters()
    )


def test_a_recorded_step_of_adalora_measures_what_a_plain_one_does(base: Path, cache: Path) -> None:
    trials = [Trial(base, cache, "adalora", (1, 2), device=DEVICE) for _ in range(2)]
    for trial in trials:
        trial.train(1)
        for linear in trial.adapted.values():
            for factor in linear.factors().values():
                factor.grad = torch.ones_like(factor)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        trials[0].method.before_step(trials[0].adapted)
    graph.replay()
    trials[1].method.before_step(trials[1].adapted)
    states = [trial.method.state(trial.adapted) for trial in trials]
    for name, expected in states[1].items():
        torch.testing.assert_close(states[0][name], expected)
