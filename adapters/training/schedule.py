"""The learning rate of every step: a linear rise, then the schedule's fall.

Integers and floats; no tensors.
"""

import math

from shoal.adapters.training.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, peak: float | None = None) -> float:
    """Learning rate of update ``step`` (from 0).

    The last update still gets a share of the peak; zero would waste it.

    Args:
        config: steps, warm-up and schedule.
        step: how many updates there were before.
        peak: the largest rate; None: the config's.
    """
    peak = config.learning_rate if peak is None else peak
    warmup = config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    if config.schedule == "linear":
        return peak * (1 - done)
    if config.schedule == "cosine":
        return peak * (1 + math.cos(math.pi * done)) / 2
    return peak
