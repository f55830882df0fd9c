"""``RESULTS.md`` and its plots, made from ``experiments.jsonl`` and nothing else. No torch."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from shoal.adapters.formats.container import write_atomically
from shoal.adapters.training.experiments.choosing import at_edge, best_rate, run_of
from shoal.adapters.training.experiments.claims import CLAIMS, Claim, answer, average, value_of
from shoal.adapters.training.experiments.log import Line, Log
from shoal.adapters.training.experiments.plots import draw_all
from shoal.adapters.training.experiments.settings import Setting
from shoal.adapters.training.experiments.statistics import spread, verdict
from shoal.adapters.training.experiments.tables import TABLES, Table
from shoal.adapters.training.experiments.tasks import TASKS

NONE = "not measured"
# Columns after the tasks', and what of the log they show.
_HEADS = {
    "average": "accuracy",
    "early loss": "early_loss",
    "final loss": "final_loss",
    "forgetting": "forgetting_loss",
    "step ms": "step_ms",
    "MiB": "peak_memory",
}
# Scale and digits.
_SHOWN = {"accuracy": (100.0, 1), "step_ms": (1.0, 1), "peak_memory": (2.0**-20, 0)}
PLOTS = "results"


def write_report(log: Log, folder: Path, *, seeds: Sequence[int], steps: int) -> list[Path]:
    """Write ``RESULTS.md`` and ``results/*.png`` into a folder; returns what was written."""
    plots = draw_all(log, folder / PLOTS, seeds=seeds, steps=steps)
    text = results(log, seeds, steps, [path.stem for path in plots])
    write_atomically(folder / "RESULTS.md", [text.encode()])
    return [folder / "RESULTS.md", *plots]


def results(log: Log, seeds: Sequence[int], steps: int, plots: Iterable[str] = ()) -> str:
    """The whole text."""
    plots = set(plots)
    parts = [_head(log, seeds, steps), _claims(log, CLAIMS, seeds, steps)]
    for table in TABLES.values():
        parts.append(_table(log, table, seeds, steps))
        if table.name in plots:
            parts.append(f"![{table.name}]({PLOTS}/{table.name}.png)")
    parts += [_costs(log), _controlled(log)]
    if "controlled" in plots:
        parts.append(f"![controlled]({PLOTS}/controlled.png)")
    return "\n\n".join(parts) + "\n"


def _head(log: Log, seeds: Sequence[int], steps: int) -> str:
    runs, scores = list(log.lines("run")), list(log.lines("score"))
    where = _where(log, "run")
    commits = ", ".join(sorted({f"`{line['commit']}`" for line in runs})) or NONE
    base = log.by_id("score")
    accuracies = ", ".join(
        f"{task} {100 * base[f'base-{task}']['accuracy']:.1f} %"
        for task in TASKS
        if f"base-{task}" in base
    )
    tasks = "\n".join(
        f"| `{name}` | {', '.join(f'`{each}`' for each in task.generators)} | {task.about} |"
        for name, task in TASKS.items()
    )
    minutes = sum(line["seconds"] / line["lanes"] for line in runs) / 60
    return f"""# The papers' claims, measured again in small

Made from `experiments.jsonl` by `python -m shoal.adapters.training.experiments report`; how it was
measured is in [experiments/README.md](experiments/README.md). SmolLM2-135M-Instruct, {steps}
updates, seeds {", ".join(map(str, seeds))} side by side, the same records in the same order for
every method; accuracy is the exact match of greedy answers on 300 questions no method was trained
on. Figures are mean ± standard deviation over seeds. A claim *holds*, or *does not hold*, when the
95 % confidence interval (Student's t) of the mean difference over seeds leaves zero out.

{len(runs)} runs, {len(scores)} scores, {minutes:.0f} minutes of training; {where};
commits {commits}.

| task | generator | asks |
|---|---|---|
{tasks}

The base alone answers: {accuracies or NONE}."""


def _where(log: Log, kind: str) -> str:
    found = sorted({f"{line['gpu']}, torch {line['torch']}" for line in log.lines(kind)})
    return "; ".join(found) or NONE


def _claims(log: Log, claims: Iterable[Claim], seeds: Sequence[int], steps: int) -> str:
    lines = [
        "## Claims",
        "",
        "| claim | paper | here | difference | a | b | tasks |",
        "|---|---|---|---|---|---|---|",
    ]
    for claim in claims:
        found = answer(log, claim, seeds, steps)
        scale, digits = (100.0, 1) if claim.metric == "accuracy" else (1.0, 3)
        cells = [
            "–" if value is None else value.text(scale, digits)
            for value in (found.difference, found.a, found.b)
        ]
        what = "" if claim.metric == "accuracy" else f" ({claim.metric.replace('_', ' ')})"
        lines.append(
            f"| {claim.text}{what} | {claim.source} | **{found.verdict}** | {' | '.join(cells)} "
            f"| {', '.join(found.tasks) or '–'} |"
        )
    return "\n".join(lines)


def _table(log: Log, table: Table, seeds: Sequence[int], steps: int) -> str:
    tasks = list(dict.fromkeys(task for _, each in table.rows for task in each))
    lines = [f"## {table.title}", ""]
    if table.about:
        lines += [f"Unlike the paper's: {table.about}.", ""]
    heads = ["setting", "values", "lr", *tasks, *_HEADS]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for setting, own in table.rows:
        lines.append(f"| {' | '.join(_cells(log, setting, own, tasks, seeds, steps))} |")
    lines += [
        "",
        f"`python -m shoal.adapters.training.experiments {table.name} --base … --out …`. Accuracy "
        "in %; losses in nats per supervised token, early: of the first tenth of the updates, "
        "final: on the validation split; forgetting: cross-entropy against the base's own "
        "distribution on prose; step and peak memory of all seeds together. * the best learning "
        "rate is an end of those tried.",
    ]
    return "\n".join(lines)


def _cells(
    log: Log,
    setting: Setting,
    own: Sequence[str],
    tasks: Sequence[str],
    seeds: Sequence[int],
    steps: int,
) -> list[str]:
    rate = best_rate(log, setting, steps)
    first = [run_of(log, setting, task, seed, steps) for task in own for seed in seeds]
    known = next((line for line in first if line is not None), None)
    edge = "*" if at_edge(log, setting, steps) else ""
    cells = [
        setting.label,
        "–" if known is None else f"{known['parameters']:,}",
        "–" if rate is None else f"{rate:g}{edge}",
    ]
    cells += [_over(log, setting, [task], seeds, steps, "accuracy") for task in tasks]
    return cells + [_over(log, setting, own, seeds, steps, metric) for metric in _HEADS.values()]


def _over(
    log: Log,
    setting: Setting,
    tasks: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    metric: str,
) -> str:
    """Mean ± sd over seeds of the average over tasks, or why there is none."""
    values = {
        (task, seed): value_of(log, setting, task, seed, steps, metric)
        for task in tasks
        for seed in seeds
    }
    whole = [seed for seed in seeds if all(values[task, seed] is not None for task in tasks)]
    if not whole:
        return "–"
    scale, digits = _SHOWN.get(metric, (1.0, 3))
    found = spread([average(log, setting, tasks, seed, steps, metric) for seed in whole])
    few = "" if len(whole) == len(seeds) else f" ({len(whole)} seeds)"
    return found.text(scale, digits) + few


def _costs(log: Log) -> str:
    lines = [
        "## Costs: LoRA-XS, Tables 5 and 6; MiSS, section 3.2 and Table 8",
        "",
        f"Measured on: {_where(log, 'cost')}. "
        "One adapter, batches of 16 records, no evaluation. Initialisation: from the loaded base "
        "to the adapted one, first with nothing in the cache, then with it. A share is of "
        "initialisation and 300 updates.",
        "",
        "| setting | values | init s | cached | share | step ms | p90 | peak MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    costs = log.by_id("cost")
    for line in costs.values():
        whole = line["init_seconds"] + 0.3 * line["step_ms"]
        lines.append(
            f"| {line['label']} | {line['parameters']:,} | {line['init_seconds']:.2f} "
            f"| {line['cached_init_seconds']:.2f} | {100 * line['init_seconds'] / whole:.1f} % "
            f"| {line['step_ms']:.2f} | {line['step_ms_p90']:.2f} "
            f"| {line['peak_memory'] / 2**20:.0f} |"
        )
    if not costs:
        lines.append(f"| {NONE} |" + " – |" * 7)
    by_label = {str(line["label"]): line for line in costs.values()}
    lines += ["", *_shares(by_label), *_ratios(by_label)]
    return "\n".join(lines)


def _shares(costs: dict[str, Line]) -> list[str]:
    """LoRA-XS, Table 5: the SVD takes less than 1 % of the training."""
    said = []
    for label in ("LoRA-XS r=16", "LoRA-XS r=16 randomised", "PiSSA r=9", "MiLoRA r=9"):
        if label not in costs:
            continue
        init, step = costs[label]["init_seconds"], costs[label]["step_ms"] / 1e3
        share = init / (init + 300 * step)
        held = "holds" if share < 0.01 else "does not hold"
        said.append(
            f"- {label}: initialisation under 1 % of the training (LoRA-XS, Table 5): "
            f"{100 * share:.1f} % of 300 updates, **{held}**; under 1 % from "
            f"{99 * init / step:,.0f} updates on."
        )
    return said


def _ratios(costs: dict[str, Line]) -> list[str]:
    def ratio(text: str, a: str, b: str, what: str) -> str:
        if a not in costs or b not in costs:
            return f"- {text}: {NONE}."
        times = costs[a][what] / costs[b][what]
        held = "holds" if times <= 1.0 else "does not hold"
        return f"- {text}: {what.replace('_', ' ')} × {times:.2f}, **{held}** (one run)."

    return [
        ratio("A LoRA-XS step is no slower than LoRA's (LoRA-XS, Table 6)", "LoRA-XS r=16",
              "LoRA r=16", "step_ms"),
        ratio("MiSS is faster than LoRA (MiSS, Table 8)", "MiSS r=16", "LoRA r=9", "step_ms"),
        ratio("and needs less memory", "MiSS r=16", "LoRA r=9", "peak_memory"),
        ratio("MiSS is faster than DoRA", "MiSS r=16", "DoRA r=9", "step_ms"),
        ratio("MiSS starts faster than PiSSA (MiSS, section 3.2)", "MiSS r=16", "PiSSA r=9",
              "init_seconds"),
        ratio("a randomised SVD starts faster than an exact one", "LoRA-XS r=16 randomised",
              "LoRA-XS r=16", "init_seconds"),
    ]  # fmt: skip


def _controlled(log: Log) -> str:
    """One table for each reading of the settings."""
    lines = [
        "## MiSS, Table 12: the controlled experiment",
        "",
        "An MLP (64-64-64) fits a sine, then its target changes: exactly the settings of Table 12; "
        "what it leaves open is said in `experiments/controlled.py`. Seed 43 is the paper's.",
    ]
    found: dict[str, dict[str, list[Line]]] = {}
    for line in log.by_id("controlled").values():
        found.setdefault(line["reading"], {}).setdefault(line["method"], []).append(line)
    if found:
        lines[-1] += f" Measured on: {_where(log, 'controlled')}."
    for reading, methods in found.items():
        lines += ["", f"### {reading[0].upper()}{reading[1:]}", "", *_reading(methods)]
    return "\n".join(lines if found else [*lines, "", f"{NONE}."])


def _reading(methods: Mapping[str, Sequence[Line]]) -> list[str]:
    def over(runs: Sequence[Line], name: str, digits: int) -> str:
        return spread([run[name] for run in runs]).text(1.0, digits)

    def mean(method: str) -> float:
        return spread([run["best_loss"] for run in methods[method]]).mean

    lines = [
        "| method | rank | values | least validation loss | seed 43 | init ms | training ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in sorted(methods, key=mean):
        runs = methods[method]
        own = next((f"{run['best_loss']:.4f}" for run in runs if run["seed"] == 43), "–")
        lines.append(
            f"| {method} | {runs[0]['rank'] or '–'} | {runs[0]['parameters']:,} "
            f"| {over(runs, 'best_loss', 4)} | {own} | {over(runs, 'init_ms', 1)} "
            f"| {over(runs, 'train_ms', 0)} |"
        )
    lines.append("")
    for a, b in (("miss", "lora"), ("miss", "vera"), ("miss", "dora"), ("pissa", "miss")):
        losses = [
            {run["seed"]: run["best_loss"] for run in methods.get(method, ())} for method in (a, b)
        ]
        seeds = losses[0].keys() & losses[1].keys()
        said = verdict([losses[1][seed] - losses[0][seed] for seed in seeds])
        lines.append(f"- {a} reaches a lower loss than {b}: **{said}** ({len(seeds)} seeds).")
    return lines
