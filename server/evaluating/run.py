"""Evaluations from beginning to end: what ``shoal evaluate`` does, and scripts call.

``evaluate_directories`` is the one function for a script: adapter directories and tasks in, scores
out. ``evaluate_on`` is its second half, for who keeps an engine open over several evaluations.
"""

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from shoal.adapters.formats.container import write_atomically
from shoal.adapters.training.evaluation.evaluating import Evaluation, Graded, evaluate
from shoal.adapters.training.evaluation.plots import plot_forgetting, plot_parameters
from shoal.adapters.training.evaluation.reasoning import PREFIX, read_reasoning_task
from shoal.adapters.training.evaluation.report import summaries, table
from shoal.adapters.training.evaluation.results import Results
from shoal.adapters.training.evaluation.runs import AdapterFacts, adapter_facts, unique_names
from shoal.adapters.training.evaluation.source import BASE
from shoal.adapters.training.evaluation.spec import TaskSpec
from shoal.adapters.training.evaluation.tasks import METRICS, Task, read_task
from shoal.server.config import ServeConfig
from shoal.server.evaluating.engine_source import EngineSource, open_source
from shoal.server.progress import Bars


def read_tasks(specs: Sequence[str]) -> list[Task]:
    """Tasks as named on the command line: ``FILE.jsonl[:…]`` or ``reasoning-gym:NAME[:…]``.

    Raises:
        DataRejected, OptionRejected: see ``tasks.read_task``, ``reasoning.read_reasoning_task``.
    """
    parsed = [TaskSpec.parse(written) for written in specs]
    return [
        read_reasoning_task(spec) if spec.source.startswith(PREFIX) else read_task(spec)
        for spec in parsed
    ]


def evaluate_directories(
    directories: Sequence[Path],
    tasks: Sequence[Task],
    *,
    config: ServeConfig,
    metrics: Collection[str] = METRICS,
    out: Path | None = None,
    progress: bool = True,
) -> Evaluation:
    """Score adapter directories, and the base, through one engine; hundreds at once are fine.

    Args:
        config: the base and the engine, as of a server; without a registry.
        metrics: those of ``METRICS`` to measure; each needs a task.
        out: a folder for results and reports, where scores are looked up before they are measured;
            None keeps nothing.

    Returns:
        Scores by adapter in the order given, the base's first, and by task. Adapters are named by
        the shortest ends of their paths that tell them apart.

    Raises:
        ModelError, ValueError: the engine cannot be built.
        AdapterUnusable: an adapter cannot be served. Nothing was measured.
        DataRejected, OptionRejected: see ``evaluating.evaluate``.
    """
    names = unique_names(list(directories), BASE)
    with open_source(config) as source:
        facts = {}
        for name, directory in zip(names, directories, strict=True):
            source.add(name, directory)
            facts[name] = adapter_facts(directory)
        return evaluate_on(
            source, names, tasks, metrics=metrics, out=out, facts=facts, progress=progress
        )


def evaluate_on(
    source: EngineSource,
    names: Sequence[str],
    tasks: Sequence[Task],
    *,
    metrics: Collection[str] = METRICS,
    out: Path | None = None,
    facts: Mapping[str, AdapterFacts] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Score adapters that ``source`` knows. See ``evaluate_directories``."""
    digests = source.digests
    adapters = {name: digests[name] for name in names}
    results = Results(None if out is None else out / "results.jsonl")
    with Bars() as bars:
        evaluation = evaluate(
            source,
            adapters,
            tasks,
            metrics=metrics,
            results=results,
            on_answer=None if out is None else _keep_answers(out / "answers.jsonl"),
            progress=bars if progress else None,
        )
    if out is not None:
        write_reports(evaluation, facts or {}, out)
    return evaluation


def write_reports(
    evaluation: Evaluation, facts: Mapping[str, AdapterFacts], out: Path
) -> list[Path]:
    """Write ``table.md`` and the plots there are points for; returns what was written."""
    out.mkdir(parents=True, exist_ok=True)
    text = table(evaluation, facts)
    write_atomically(out / "table.md", [text.encode()])
    written = [out / "table.md"]
    found = summaries(evaluation.scores)
    for name, plot in (("parameters.png", plot_parameters), ("forgetting.png", plot_forgetting)):
        if plot(found, facts, out / name):
            written.append(out / name)
    with (out / "throughput.jsonl").open("a", encoding="utf-8") as file:
        for part in evaluation.throughput:
            file.write(json.dumps(asdict(part)) + "\n")
    return written


def _keep_answers(path: Path) -> Callable[[Graded], None]:
    """Appends answers, for people to read; those of a score that was not completed may be there
    twice after another run."""

    def keep(graded: Graded) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(asdict(graded), ensure_ascii=False) + "\n"
        with path.open("ab", buffering=0) as file:
            os.write(file.fileno(), line.encode())

    return keep
