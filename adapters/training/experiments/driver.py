"""Works through tables until they are complete or the time is up.

What is begun must end before the deadline, scoring included, so each group's time is foreseen from
those before it.
"""

import logging
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from shoal.adapters.training.experiments.choosing import (
    best_rate,
    main_group,
    missing_of,
    sweep_left,
)
from shoal.adapters.training.experiments.plan import AROUND_S, TOKENS_S, tokens_of
from shoal.adapters.training.experiments.running import Lab, run_group
from shoal.adapters.training.experiments.scoring import OpenSource, score_all
from shoal.adapters.training.experiments.settings import Group
from shoal.adapters.training.experiments.tables import Table

log = logging.getLogger(__name__)

# Seconds, before anything was measured: around a group's steps; opening the engine and its first
# steps; scoring one adapter. A little more than an H100 took.
FIXED_S = AROUND_S + 0.5
TOKEN_S = 1.1 / TOKENS_S
ENGINE_S, SCORE_S = 15.0, 2.0


@dataclass
class Clock:
    """Says what still fits before the deadline (of ``time.monotonic()``)."""

    deadline: float
    token_s: float = TOKEN_S
    score_s: float = SCORE_S

    def trains(self, group: Group, unscored: int, *, scored: bool) -> bool:
        """Whether a group, and the scores of all that has none then, would be done in time."""
        after = unscored + len(group.lanes) if scored else 0
        return self.left() > self.training_s(group) + self.scoring_s(after)

    def training_s(self, group: Group) -> float:
        """Seconds that a group will take."""
        return FIXED_S + self.token_s * tokens_of(group)

    def scoring_s(self, runs: int) -> float:
        """Seconds that scoring will take."""
        return ENGINE_S + self.score_s * runs if runs else 0.0

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def took(self, group: Group, seconds: float) -> None:
        """Learn from a group: what is slower than foreseen is foreseen so from now on."""
        self.token_s = max(self.token_s, 1.1 * (seconds - FIXED_S) / tokens_of(group))


def work(
    lab: Lab,
    tables: Iterable[Table],
    clock: Clock,
    open_source: OpenSource | None,
    *,
    limit: int | None = None,
    keep: bool = False,
) -> bool:
    """Train what is missing, and score it with one engine at the end.

    Args:
        lab: where.
        tables: in this order.
        clock: when to stop.
        open_source: what scores; None: nothing is scored.
        limit: items of a test split that are asked; None: all.
        keep: keep the directories of runs that were scored.

    Returns:
        Whether everything is there now.
    """
    complete = _train(lab, tables, clock, scored=open_source is not None)
    if open_source is not None:
        complete &= score(lab, open_source, clock, limit=limit, keep=keep)
    return complete


def _train(lab: Lab, tables: Iterable[Table], clock: Clock, *, scored: bool) -> bool:
    """Train what is missing; False when time ran out. ``scored``: leave time for scoring."""
    for table in tables:
        for group in _missing(lab, table):
            waiting = len(lab.unscored()) if scored else 0
            if not clock.trains(group, waiting, scored=scored):
                log.info("out of time table=%s left=%.0fs", table.name, clock.left())
                return False
            _run(lab, table, group, clock)
    return True


def score(
    lab: Lab, open_source: OpenSource, clock: Clock, *, limit: int | None, keep: bool
) -> bool:
    """Score what has no score; True when everything has one."""
    before = lab.unscored()
    started = time.monotonic()
    left = score_all(lab, open_source, clock.deadline, limit)
    done = len(before) - left
    if done:
        clock.score_s = max(clock.score_s, (time.monotonic() - started - ENGINE_S) / done)
    if not keep:
        scored = set(before) - set(lab.unscored())
        lines = lab.log.by_id("run")
        for run in scored:
            directory = lab.out / lines[run]["directory"]
            shutil.rmtree(directory, ignore_errors=True)
            if not any(path.is_dir() for path in directory.parent.glob("*")):
                shutil.rmtree(directory.parent, ignore_errors=True)
    return not left


def _missing(lab: Lab, table: Table) -> Iterator[Group]:
    """Groups to run, the next known only when the one before is in the log (it may be a sweep)."""
    for setting, tasks in table.rows:
        while (sweep := sweep_left(lab.log, setting, lab.steps)) is not None:
            yield sweep
        rate = best_rate(lab.log, setting, lab.steps)
        if rate is None:
            log.warning("every rate diverged setting=%s", setting.label)
            continue
        for task in tasks:
            wanted = main_group(setting, task, rate, lab.seeds, lab.steps)
            group = missing_of(lab.log, wanted, lab.present)
            if group is not None:
                yield group


def _run(lab: Lab, table: Table, group: Group, clock: Clock) -> None:
    started = time.monotonic()
    run_group(lab, table.name, group)
    seconds = time.monotonic() - started
    clock.took(group, seconds)
    directory = lab.directory(group)
    shutil.rmtree(directory / "checkpoint", ignore_errors=True)
    if any(seed not in lab.seeds for seed, _ in group.lanes):  # a sweep: its losses are logged
        shutil.rmtree(directory, ignore_errors=True)
    log.info(
        "trained table=%s setting=%r task=%s lanes=%d seconds=%.1f left=%.0fs",
        table.name,
        group.setting.label,
        group.task,
        len(group.lanes),
        seconds,
        clock.left(),
    )
