"""Which learning rate a sweep chose, and which runs of the log belong to a setting. No torch."""

import math
from collections.abc import Callable, Mapping, Sequence

from shoal.adapters.training.experiments.log import Line, Log
from shoal.adapters.training.experiments.settings import (
    BEYOND,
    SWEEP_SEED,
    SWEEP_TASK,
    Group,
    Setting,
    run_id,
    sweep_of,
)

# Whether the adapter of a run (its line) is still there.
Present = Callable[[Line], bool]


def best_rate(log: Log, setting: Setting, steps: int) -> float | None:
    """The learning rate with the least validation loss in the sweep; None without one.

    Runs that diverged count as infinitely bad.
    """
    if setting.lr is not None:
        return setting.lr
    losses, left = _swept(log, setting, steps)
    return None if left else _best(losses)


def sweep_left(log: Log, setting: Setting, steps: int) -> Group | None:
    """What a setting's sweep has still to train; None when its rate is chosen, or fixed.

    First the grid. While the best is an end of what was tried, then the next rate beyond it, at
    most `BEYOND` times.
    """
    if setting.lr is not None:
        return None
    _, left = _swept(log, setting, steps)
    return sweep_of(setting, steps, left) if left else None


def at_edge(log: Log, setting: Setting, steps: int) -> bool:
    """Whether the best rate is an end of what was tried, so that a better one may lie outside."""
    losses, left = _swept(log, setting, steps)
    best = _best(losses)
    return setting.lr is None and not left and best is not None and _is_end(losses, best)


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


def _swept(log: Log, setting: Setting, steps: int) -> tuple[dict[float, float], tuple[float, ...]]:
    """Validation losses by rate, and the rates to try next; the choice is made when there are none.

    Rates of neither the grid nor beyond it are ignored, even if the log has them.
    """
    done = log.by_id("run")

    def loss_at(rate: float) -> float | None:
        line = done.get(run_id(setting, SWEEP_TASK, rate, SWEEP_SEED, steps))
        return None if line is None else _loss_or_inf(line["final_loss"])

    found = {rate: loss_at(rate) for rate in setting.grid}
    losses = {rate: loss for rate, loss in found.items() if loss is not None}
    left = tuple(rate for rate, loss in found.items() if loss is None)
    for _ in range(BEYOND):
        best = _best(losses)
        if left or best is None or not _is_end(losses, best):
            break
        rate = _beyond(sorted(losses), best)
        loss = loss_at(rate)
        if loss is None:
            left = (rate,)
        else:
            losses[rate] = loss
    return losses, left


def _best(losses: Mapping[float, float]) -> float | None:
    """The rate with the least loss, None when all diverged."""
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    return min(finite, key=finite.__getitem__) if finite else None


def _is_end(losses: Mapping[float, float], rate: float) -> bool:
    return rate in (min(losses), max(losses))


def _beyond(rates: Sequence[float], end: float) -> float:
    """The rate beyond an end of ascending ones, as far from it as its neighbour; one digit."""
    neighbour = rates[1] if end == rates[0] else rates[-2]
    return float(f"{end * end / neighbour:.0e}")


def _loss_or_inf(loss: float | None) -> float:
    return math.inf if loss is None or not math.isfinite(loss) else loss
