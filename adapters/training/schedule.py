"""The learning rate of every step: a linear rise, then the schedule's fall.

Integers and floats; no tensors.
"""

import math


def learning_rate(step: int, *, peak: float, steps: int, warmup_steps: int, schedule: str) -> float:
    """Learning rate of update ``step`` (from 0).

    The last update still gets a share of the peak; zero would waste it.

    Args:
        step: how many updates there were before.
        peak: the largest rate.
        steps: updates in all.
        warmup_steps: updates over which it rises.
        schedule: ``cosine``, ``linear`` or ``constant``.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    if schedule == "linear":
        return peak * (1 - done)
    if schedule == "cosine":
        return peak * (1 + math.cos(math.pi * done)) / 2
    return peak
