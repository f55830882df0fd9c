"""Scores trained runs: exact match on their task's test split, and what they forgot.

Answers come from an ``AdapterSource``, which is the serving engine when the command line is used;
this package knows only the protocol.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from shoal.adapters.training.evaluation.evaluating import evaluate
from shoal.adapters.training.evaluation.results import Results, Score
from shoal.adapters.training.evaluation.source import BASE, AnswerSource
from shoal.adapters.training.evaluation.spec import TaskSpec
from shoal.adapters.training.evaluation.tasks import Task, read_task
from shoal.adapters.training.experiments.place import place
from shoal.adapters.training.experiments.running import Lab, forget_peak
from shoal.adapters.training.experiments.tasks import FORGETTING, TASKS, path_of

log = logging.getLogger(__name__)

# Adapters scored before the clock is looked at again.
AT_ONCE = 12
METRICS = ("exact", "forgetting")


class AdapterSource(AnswerSource, Protocol):
    """An ``AnswerSource`` that reads adapters from directories."""

    def add(self, name: str, directory: Path) -> object:
        """Know the adapter in ``directory`` as ``name``."""
        ...

    def forget(self, name: str) -> None:
        """Know it no more."""
        ...

    @property
    def digests(self) -> Mapping[str, str]:
        """Of the known adapters, by name."""
        ...


class OpenSource(Protocol):
    """Opens a source over a base; what the module named by ``--scorer`` has as ``open_source``."""

    def __call__(self, base: Path, device: str) -> AbstractContextManager[AdapterSource]: ...


def score_all(lab: Lab, open_source: OpenSource, deadline: float, limit: int | None) -> int:
    """Score what has no score, until the deadline.

    Args:
        lab: the runs.
        open_source: opens the engine; not called when nothing is to be scored.
        deadline: of ``time.monotonic()``; a batch of adapters is not begun after it.
        limit: items of a test split that are asked; None: all.

    Returns:
        How many runs are without a score.
    """
    todo = list(_by_task(lab, lab.unscored()))
    if not todo:
        return 0
    forget_peak()  # the engine takes what memory there is
    results = Results()
    longest = 0.0
    with open_source(lab.base, lab.device) as source:
        for task, runs in todo:
            started = time.monotonic()
            if started + longest > deadline:
                break
            _score(lab, source, task, runs, results, limit)
            longest = max(longest, time.monotonic() - started)
    return len(lab.unscored())


def _by_task(lab: Lab, runs: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Runs of one task together, at most ``AT_ONCE``."""
    lines = lab.log.by_id("run")
    for task in TASKS:
        of_task = [run for run in runs if lines[run]["task"] == task]
        for at in range(0, len(of_task), AT_ONCE):
            yield task, of_task[at : at + AT_ONCE]


def _score(
    lab: Lab,
    source: AdapterSource,
    task: str,
    runs: Sequence[str],
    results: Results,
    limit: int | None,
) -> None:
    lines = lab.log.by_id("run")
    tests = [_test(lab, task, limit), _text(lab, limit)]
    added = []
    for run in runs:
        try:
            source.add(run, lab.out / lines[run]["directory"])
        except Exception as problem:  # whatever the source raises: the others have their scores
            log.warning("not scored run=%s: %s", run, problem)
        else:
            added.append(run)
    runs, digests = added, source.digests
    try:
        adapters = {run: digests[run] for run in runs}
        done = evaluate(source, adapters, tests, metrics=METRICS, results=results)
    finally:
        for run in runs:
            source.forget(run)
    took = " ".join(f"{part.metric}={part.seconds:.1f}s" for part in done.throughput)
    log.info("scored task=%s adapters=%d %s", task, len(runs), took)
    for name in [BASE, *runs]:
        _log(lab, task, name, [score for score in done.scores if score.adapter == name])


def _log(lab: Lab, task: str, name: str, scores: Sequence[Score]) -> None:
    values = {score.metric: score.values for score in scores}
    exact, text = values["exact"], values["forgetting"]
    run = f"{BASE}-{task}" if name == BASE else name
    if name == BASE and run in lab.log.by_id("score"):
        return
    lab.log.append(
        "score",
        id=run,
        task=task,
        accuracy=exact["accuracy"],
        unfinished=exact["unfinished"],
        forgetting_loss=text["cross_entropy"],
        base_entropy=text["entropy"],
        kl=text["kl"],
        items=next(score.items for score in scores if score.metric == "exact"),
        dtype=scores[0].dtype,
        **place(),
    )


def _test(lab: Lab, task: str, limit: int | None) -> Task:
    options = {"max_tokens": str(TASKS[task].max_tokens), "name": task}
    if limit is not None:
        options["limit"] = str(limit)
    return read_task(TaskSpec(str(path_of(lab.data, task, "test")), options))


def _text(lab: Lab, limit: int | None) -> Task:
    options = {} if limit is None else {"limit": str(max(1, limit // 10))}
    return read_task(TaskSpec(str(lab.data / FORGETTING), options))
