"""Which learning rate a sweep chose, and which runs of the log belong to a setting. No torch."""

import math
from collections.abc import Callable, Sequence

from shoal.adapters.training.experiments.log import Line, Log
from shoal.adapters.training.experiments.settings import Group, Setting, run_id, sweep_of

# Whether the adapter of a run (its line) is still there.
Present = Callable[[Line], bool]


def best_rate(log: Log, setting: Setting, steps: int) -> float | None:
    """The learning rate with the least validation loss in the sweep; None without one.

    Runs that diverged count as infinitely bad.
    """
    if setting.lr is not None:
        return setting.lr
    done = log.by_id("run")
    sweep = sweep_of(setting, steps)
    if any(run not in done for run in sweep.runs):
        return None
    losses = [_loss_or_inf(done[run]["final_loss"]) for run in sweep.runs]
    best = min(losses)
    return setting.grid[losses.index(best)] if math.isfinite(best) else None


def at_edge(setting: Setting, rate: float) -> bool:
    """Whether the best rate is an end of its grid, so that a better one may lie outside."""
    return setting.lr is None and rate in (setting.grid[0], setting.grid[-1])


def main_group(setting: Setting, task: str, rate: float, seeds: Sequence[int], steps: int) -> Group:
    """The runs that count: one lane for each seed."""
    return Group(setting, task, tuple((seed, rate) for seed in seeds), steps)


def missing_of(log: Log, group: Group, present: Present | None = None) -> Group | None:
    """The lanes of a group that are still to be trained; None when there are none.

    Args:
        log: what was done.
        group: what is wanted.
        present: whether a run's adapter is still there; None: it is not needed. One that was lost
            before it had its score, with the machine it was on, is trained again.
    """
    done = log.by_id("run")
    scored = log.by_id("score")

    def kept(run: str) -> bool:
        if run not in done:
            return False
        needed = present is not None and run not in scored and not done[run].get("diverged")
        return not needed or (present is not None and present(done[run]))

    lanes = tuple(lane for lane, run in zip(group.lanes, group.runs, strict=True) if not kept(run))
    return Group(group.setting, group.task, lanes, group.steps) if lanes else None


def run_of(log: Log, setting: Setting, task: str, seed: int, steps: int) -> Line | None:
    """One run's line and score as one, if it was trained and did not diverge."""
    rate = best_rate(log, setting, steps)
    if rate is None:
        return None
    run = run_id(setting, task, rate, seed, steps)
    line = log.by_id("run").get(run)
    if line is None or line.get("diverged"):
        return None
    score = log.by_id("score").get(run, {})
    return {**score, **line}


def unscored(log: Log, seeds: Sequence[int], present: Present) -> list[str]:
    """Runs that count and have no score; those of sweeps are chosen among by their loss."""
    scored = log.by_id("score")
    return [
        run
        for run, line in log.by_id("run").items()
        if run not in scored
        and line["seed"] in seeds
        and not line.get("diverged")
        and present(line)
    ]


def _loss_or_inf(loss: float | None) -> float:
    return math.inf if loss is None or not math.isfinite(loss) else loss
