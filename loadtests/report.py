"""Shows the numbers of a run: a table for people, one JSON line for programs, a PNG.

Counts tokens that were received, never tokens that were asked for.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shoal.loadtests.stats import Percentiles, Sample, Summary, by_adapter, summarise

BASE = "(base)"
ROWS_SHOWN = 20


def table(samples: Sequence[Sample], rows_max: int = ROWS_SHOWN) -> str:
    """Overall and per adapter: requests, tokens/s, TTFT and ITL percentiles."""
    groups = by_adapter(samples)
    shown = list(groups.items())[:rows_max]
    lines = [
        f"{'adapter':<28} {'ok':>5} {'fail':>4} {'tok/s':>9}   "
        f"{'TTFT ms p50/p90/p99':>24}   {'ITL ms p50/p90/p99':>22}"
    ]
    lines += [_row(name or BASE, summarise(group)) for name, group in shown]
    if len(groups) > len(shown):
        lines.append(f"... and {len(groups) - len(shown)} more adapters (all are in the records)")
    lines.append(_row("all", summarise(samples)))
    return "\n".join(lines)


def record(
    samples: Sequence[Sample], conditions: Mapping[str, Any], objectives: Mapping[str, float]
) -> dict[str, Any]:
    """Everything a reader needs to repeat and compare the run."""
    return {
        "conditions": dict(conditions),
        "objectives_ms": dict(objectives),
        "overall": asdict(summarise(samples, objectives or None)),
        "adapters": {
            name or BASE: asdict(summarise(group, objectives or None))
            for name, group in by_adapter(samples).items()
        },
    }


def last_line(full: Mapping[str, Any]) -> str:
    """The run in one JSON line, without the per-adapter part."""
    conditions, overall = full["conditions"], full["overall"]
    assert not conditions.keys() & overall.keys(), "a result would hide a condition"
    return json.dumps({"bench": "serve", **conditions, **overall})


def save(
    directory: Path, samples: Sequence[Sample], full: Mapping[str, Any], name: str
) -> list[Path]:
    """Write ``<name>.json`` (summary), ``<name>.jsonl`` (one line per request), ``<name>.png``."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{name}.{suffix}" for suffix in ("json", "jsonl", "png")]
    paths[0].write_text(json.dumps(full, indent=2) + "\n")
    with paths[1].open("w") as lines:
        for sample in samples:
            lines.write(json.dumps(asdict(sample)) + "\n")
    plot(paths[2], samples)
    return paths


def plot(path: Path, samples: Sequence[Sample]) -> None:
    """Tokens received per second over time; TTFT over time; tokens/s per adapter."""
    # Imported here: it takes half a second, and a run without --save-dir does not draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    good = [s for s in samples if s.error is None and s.token_s]
    start = min((s.sent_s for s in samples), default=0.0)
    figure = Figure(figsize=(10, 9), layout="constrained")
    FigureCanvasAgg(figure)
    rate, first, per_adapter = figure.subplots(3, 1)
    times = [t - start for s in good for t in s.token_s]
    seconds = int(max(times, default=0.0)) + 1
    rate.hist(times, bins=seconds, range=(0, seconds), color="tab:blue")
    rate.set(xlabel="s", ylabel="output tokens / s", title="received")
    first.plot([s.sent_s - start for s in good], [s.ttft_ms for s in good], ".", color="tab:orange")
    first.set(xlabel="sent at, s", ylabel="TTFT, ms", ylim=(0, None))
    rates = [summarise(group).output_tok_s for group in by_adapter(good).values()]
    per_adapter.bar(range(len(rates)), rates, width=1.0, color="tab:green")
    per_adapter.set(xlabel="adapter, busiest first", ylabel="output tokens / s")
    figure.savefig(path, dpi=100)


def _row(name: str, summary: Summary) -> str:
    return (
        f"{name[:28]:<28} {summary.completed:>5} {summary.failed:>4} "
        f"{summary.output_tok_s:>9.1f}   {_triple(summary.ttft_ms):>24}   "
        f"{_triple(summary.itl_ms):>22}"
    )


def _triple(values: Percentiles | None) -> str:
    if values is None:
        return "-"
    return f"{values.p50:.1f} / {values.p90:.1f} / {values.p99:.1f}"
