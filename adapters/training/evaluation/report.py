"""``table.md``: every adapter a row, every task a column. Text only; ``plots.py`` draws."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shoal.adapters.training.evaluation.evaluating import Evaluation, Throughput
from shoal.adapters.training.evaluation.results import Score
from shoal.adapters.training.evaluation.runs import AdapterFacts
from shoal.adapters.training.evaluation.scoring import mean
from shoal.adapters.training.evaluation.source import BASE


@dataclass(frozen=True, slots=True)
class Summary:
    """One adapter over all its tasks.

    Attributes:
        accuracy: mean over its tasks of ``exact`` and ``choice``; None without any.
        kl, cross_entropy: means over its texts; None without any.
    """

    adapter: str
    accuracy: float | None
    kl: float | None
    cross_entropy: float | None


def summaries(scores: Sequence[Score]) -> list[Summary]:
    """One for each adapter, in the order in which they first occur."""
    by_adapter: dict[str, list[Score]] = {}
    for score in scores:
        by_adapter.setdefault(score.adapter, []).append(score)
    out = []
    for adapter, own in by_adapter.items():
        accuracies = [s.values["accuracy"] for s in own if s.metric != "forgetting"]
        texts = [s.values for s in own if s.metric == "forgetting"]
        out.append(
            Summary(
                adapter,
                mean(accuracies) if accuracies else None,
                mean([values["kl"] for values in texts]) if texts else None,
                mean([values["cross_entropy"] for values in texts]) if texts else None,
            )
        )
    return out


def table(evaluation: Evaluation, facts: Mapping[str, AdapterFacts]) -> str:
    """Markdown. Accuracies in percent with their standard errors over items; texts in nats."""
    scores = evaluation.scores
    tasks = list(dict.fromkeys((score.task, score.metric) for score in scores))
    found = {(score.adapter, score.task, score.metric): score for score in scores}
    head = ["adapter", "method", "r", "parameters", "bytes", "train s", "peak MiB"]
    for task, metric in tasks:
        head += [f"{task} {name}" for name in _COLUMNS[metric]]
    accuracies = sum(metric != "forgetting" for _, metric in tasks)
    if accuracies > 1:
        head.append("mean")
    rows = []
    for summary in summaries(scores):
        row = [summary.adapter, *_fact_cells(summary.adapter, facts.get(summary.adapter))]
        for task, metric in tasks:
            row += _cells(found.get((summary.adapter, task, metric)), metric)
        if accuracies > 1:
            row.append("" if summary.accuracy is None else f"{100 * summary.accuracy:.1f}")
        rows.append(row)
    lines = [_line(head), _line(["---"] * len(head)), *map(_line, rows), ""]
    lines += [f"- {told}" for told in _legend(evaluation)]
    return "\n".join(lines) + "\n"


def throughput_line(part: Throughput) -> str:
    """What a metric took, for people."""
    things = {"exact": "answers", "choice": "items", "forgetting": "texts"}[part.metric]
    rate = part.tokens / part.seconds if part.seconds else 0.0
    kind = "generated" if part.metric == "exact" else "scored"
    return (
        f"{part.metric}: {part.items} {things} in {part.seconds:.1f} s"
        f" ({part.items / part.seconds:.2f} a second, {rate:.0f} tokens/s {kind})"
    )


_COLUMNS: Mapping[str, Sequence[str]] = {
    "exact": ("exact %",),
    "choice": ("choice %", "by length %"),
    "forgetting": ("cross-entropy", "KL"),
}


def _cells(score: Score | None, metric: str) -> list[str]:
    if score is None:
        return [""] * len(_COLUMNS[metric])
    values = score.values
    if metric == "exact":
        return [_share(values["accuracy"], values["stderr"])]
    if metric == "choice":
        return [
            _share(values["accuracy"], values["stderr"]),
            _share(values["accuracy_norm"], values["stderr_norm"]),
        ]
    return [f"{values['cross_entropy']:.4f}", f"{values['kl']:.4f}"]


def _share(value: float, error: float) -> str:
    return f"{100 * value:.1f} ± {100 * error:.1f}"


def _fact_cells(adapter: str, facts: AdapterFacts | None) -> list[str]:
    if adapter == BASE:
        return ["", "", "0", "0", "", ""]
    if facts is None:
        return [""] * 6
    peak = None if facts.peak_bytes is None else facts.peak_bytes / (1 << 20)
    beside = f" ({facts.lanes} at once)" if facts.lanes > 1 else ""
    return [
        facts.method,
        _known(facts.rank, "d"),
        _known(facts.parameters, ","),
        f"{facts.file_bytes:,}",
        _known(facts.train_seconds, ".1f") + beside,
        _known(peak, ".0f"),
    ]


def _known(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _legend(evaluation: Evaluation) -> list[str]:
    metrics = {score.metric for score in evaluation.scores}
    lines = []
    if metrics - {"forgetting"}:
        lines.append("±: standard error of the mean over items")
    if "choice" in metrics:
        lines.append("by length: log-probabilities divided by the bytes of the choice")
    if "forgetting" in metrics:
        lines.append("cross-entropy: the base's own distribution as target, nats a token;")
        lines[-1] += " the base's is its entropy, and KL is what comes on top"
    return [*lines, *map(throughput_line, evaluation.throughput)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
