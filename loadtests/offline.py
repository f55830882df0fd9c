"""``shoal bench offline``: the engine alone, without HTTP, on a named shape and random weights.

All requests are given at once and run to their last token through the real scheduler and runner.
The base runs beside the adapters, in turns, in the same process. This is one case and its report;
``matrix.py`` runs many on one engine.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

from shoal.loadtests.driver import Bench, Case, Outcome, RunFailed
from shoal.loadtests.measuring import (
    add_engine_arguments,
    bounds,
    count,
    make_bench,
    medians,
    positive,
    profile_tables,
    refuse,
    say,
    split,
    warm_up,
)
from shoal.loadtests.record import ADAPTERS, BASE, Record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    add = parser.add_argument
    add("--requests", type=positive, default=256, help="given all at once")
    add("--input", type=positive, default=128, help="prompt tokens of each request")
    add("--output", type=positive, default=128, help="output tokens of each request")
    add("--adapters", type=count, default=0, help="different adapters in use; 0: only the base")
    add_engine_arguments(parser, model_shape="smollm2-135m")


def run(args: argparse.Namespace) -> int:
    """Measure and report; returns 0, or 2 when it cannot be done as asked."""
    if args.resident and args.resident < args.adapters:
        return refuse(f"--resident is {args.resident}: must be at least --adapters")
    case = Case(args.requests, args.input, args.output)
    resident = (args.resident or args.adapters) if args.adapters else 0
    try:
        bench = make_bench(args, [case], resident=resident)
    except ValueError as problem:
        return refuse(str(problem))
    try:
        summary = _measure(bench, case, args)
    except RunFailed as problem:
        return refuse(str(problem))
    print(json.dumps(summary))
    return 0


def _measure(bench: Bench, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    sides = {BASE: 0, ADAPTERS: args.adapters} if args.adapters else {BASE: 0}
    for adapters in sides.values():
        warm_up(bench, case, adapters)
    record = Record.begin(bench.engine, args.results, args.rounds, args.commit)
    outcomes: dict[str, list[Outcome]] = {side: [] for side in sides}
    for number in range(1, args.rounds + 1):
        for side, adapters in sides.items():
            outcome = bench.outcome(case, adapters)
            outcomes[side].append(outcome)
            figures = outcome.figures()
            say(f"round {number} {side}: {figures['output_tok_s']} tok/s")
            record.append(record.line(case, adapters, kind="run", round=number, **figures))
    copy_rate = bench.engine.copy_bytes_per_s()
    rows = {side: medians([outcome.figures() for outcome in outcomes[side]]) for side in sides}
    for side, figures in rows.items():
        ratio = figures["output_tok_s"] / rows[BASE]["output_tok_s"]
        figures["ratio_to_base"] = round(ratio, 4)
        distinct = min(sides[side], figures["decode_rows"])
        figures |= bounds(bench.engine, figures, distinct, copy_rate)
    print(_table(rows), flush=True)
    if args.profile:
        for side, adapters in sides.items():
            found = bench.profile(case, adapters)
            print(profile_tables(side, found), flush=True)
            rows[side]["split"] = split(found, rows[side]["step_ms"])
            record.append(record.line(case, adapters, kind="profile", **rows[side]))
    last = rows[ADAPTERS if args.adapters else BASE]
    summary = record.line(case, args.adapters, copy_bytes_per_s=round(copy_rate), **last)
    if args.adapters:
        summary["base"] = rows[BASE]
        one, other = outcomes[BASE][-1].tokens, outcomes[ADAPTERS][-1].tokens
        summary["changed_requests"] = sum(one[name] != other[name] for name in one)
    return summary


def _table(rows: dict[str, dict[str, Any]]) -> str:
    columns: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
        ("output_tok_s", "tok/s", lambda v: f"{v:.0f}"),
        ("ratio_to_base", "of base", lambda v: f"{v:.3f}"),
        ("step_ms", "decode ms", lambda v: f"{v:.2f}"),
        ("bound_ms", "bound ms", lambda v: f"{v:.2f}"),
        ("of_bound", "% bound", lambda v: f"{v:.1f}"),
        ("wait_ms", "wait", lambda v: f"{v:.2f}"),
        ("host_ms", "CPU", lambda v: f"{v:.2f}"),
        ("plan_ms", "plan", lambda v: f"{v:.2f}"),
        ("submit_ms", "submit", lambda v: f"{v:.2f}"),
        ("commit_ms", "commit", lambda v: f"{v:.2f}"),
        ("prefill_s", "prefill s", lambda v: f"{v:.2f}"),
    )
    lines = [f"{'':<9}" + "".join(f"{title:>10}" for _, title, _ in columns)]
    for side, figures in rows.items():
        cells = ((figures[key], shown) for key, _, shown in columns)
        text = "".join(f"{'-' if value is None else shown(value):>10}" for value, shown in cells)
        lines.append(f"{side:<9}{text}")
    lines.append(
        "bound: weights, KV and adapters of a decode step, read at the rate of a device copy"
    )
    return "\n".join(lines)
