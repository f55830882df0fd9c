"""Trains in processes of its own: killed ones, and several that train together. Run by the tests.

It imports once and forks, which is much quicker than starting Python for every process. Each
argument is a job as JSON: what to do, a number, and the config.
"""

import dataclasses
import functools
import json
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Imported when they are needed, which would otherwise be in every process anew.
import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.lanes import lanes_of
from shoal.adapters.training.metrics import StepMetrics
from shoal.adapters.training.rundir import RunDirectory
from shoal.adapters.training.trainer import OnStep, train
from shoal.adapters.training.world import World


def config_of(values: dict[str, Any]) -> TrainConfig:
    for name in ("base", "data", "out", "eval_data"):
        if values[name] is not None:
            values[name] = Path(values[name])
    for name in ("targets", "seeds"):
        values[name] = tuple(values[name])
    return TrainConfig(**values)


def run(config: TrainConfig, world: World, on_step: OnStep | None = None) -> None:
    cache_dir = config.out.parent / "bases"
    options: dict[str, Any] = {"cache_dir": cache_dir, "progress": False, "on_step": on_step}
    if config.seeds:
        train(config, lanes=lanes_of(config), world=world, **options)
    else:
        train(config, world=world, **options)


def in_a_child(work: Callable[[], None]) -> int:
    """Begins the work in a process of its own; its id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def killed_at(step: int, delay: float) -> OnStep:
    """Kills this process after a step, at once or a little later, wherever it then is."""

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def on_step(done: StepMetrics) -> None:
        if done.step == step and delay == 0.0:
            kill()
        elif done.step == step:
            threading.Timer(delay, kill).start()

    return on_step


def killed_again_and_again(config: TrainConfig, seed: int) -> None:
    """Start, kill and resume until the run is through; writes how often it was killed."""
    chance = random.Random(seed)
    kills = [(3, 0.0)] + [(chance.randint(4, config.steps), chance.random() / 10) for _ in range(2)]
    killed = 0
    for step, delay in [*kills, (0, 0.0)]:
        resume = RunDirectory(config.out).checkpoint.exists()
        attempt = dataclasses.replace(config, resume=resume, overwrite=not resume)
        on_step = killed_at(step, delay)
        child = in_a_child(functools.partial(run, attempt, World(), on_step))
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    (config.out / "killed").write_text(str(killed))


def together(config: TrainConfig, size: int) -> None:
    """Train in ``size`` processes that find each other through a file."""
    meeting = f"file://{config.out.parent / 'meeting'}"
    worlds = [World(rank, size, rank, meeting) for rank in range(size)]
    children = [in_a_child(functools.partial(run, config, world)) for world in worlds]
    for child in children:
        _, status = os.waitpid(child, 0)
        assert status == 0


if __name__ == "__main__":
    for what, number, config in map(json.loads, sys.argv[1:]):
        {"kill": killed_again_and_again, "together": together}[what](config_of(config), number)
