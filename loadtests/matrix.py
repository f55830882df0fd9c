"""Many cases on one engine: ``python -m shoal.loadtests.matrix --cases 256x128x128,32x128x128``.

Machines with the right GPU are rented by the second, so everything is built once, each run's line
is kept as soon as there is one, and no case begins when the time is used up. In each round the base
runs, and then each number of adapters; the ratio of a round is of neighbours in time.
"""

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

from shoal.loadtests.driver import Bench, Case, Outcome
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
from shoal.loadtests.record import Record

# Free places in the bank while uploads come; each may be on its way or just replaced.
UPLOAD_PLACES = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all that fits the budget; returns 0, 1 when a case failed, 2 when nothing ran."""
    begin = time.perf_counter()
    args = _parse(argv)
    most = max(args.adapters)
    resident = (args.resident or most) if most else 0
    if resident < most:
        return refuse(f"--resident is {resident}: must be at least the largest of --adapters")
    try:
        bench = make_bench(
            args, args.cases, resident=resident, spare=UPLOAD_PLACES if args.uploads and most else 0
        )
    except ValueError as problem:
        return refuse(str(problem))
    matrix = Matrix(bench, args, end=begin + args.budget_s)
    failed = False
    try:
        for index, case in enumerate(args.cases):
            if matrix.overdue:
                say(f"{case}: not begun, {args.budget_s} s are used up")
                continue
            matrix.measure(case)
            if index == 0 and args.uploads and most:
                matrix.measure_uploads(case)
            if index == 0 and args.profile:
                matrix.profile(case)
    except Exception:  # whatever it was: what has been measured is reported
        traceback.print_exc()
        failed = True
    print(_table(matrix.rows), flush=True)
    summary = {
        "run_id": matrix.record.shared["run_id"],
        "seconds": round(time.perf_counter() - begin, 1),
        "built": bench.engine.seconds,
        "failed": failed,
        "cases": matrix.rows,
        "uploads": matrix.uploads,
    }
    print(json.dumps(summary))
    return 1 if failed else 0


class Matrix:
    """Measured cases so far.

    Attributes:
        rows: one for each case and number of adapters, the base's (0) first.
        uploads: step times with and without uploads, if they were asked for.
    """

    def __init__(self, bench: Bench, args: argparse.Namespace, end: float) -> None:
        """``end``: of the budget, by the performance counter."""
        self.bench = bench
        self.record = Record.begin(bench.engine, args.results, args.rounds, args.commit)
        self.rows: list[dict[str, Any]] = []
        self.uploads: dict[str, Any] | None = None
        self._args = args
        self._end = end
        self._copy_rate = bench.engine.copy_bytes_per_s()

    @property
    def overdue(self) -> bool:
        return time.perf_counter() >= self._end

    def measure(self, case: Case) -> None:
        """All rounds of one case, or as many as there is time for."""
        counts = self._counts(case)
        outcomes: dict[int, list[Outcome]] = {adapters: [] for adapters in (0, *counts)}
        # What a step launches does not depend on how many adapters its rows have.
        for adapters in sorted({0, *counts[-1:]}):
            warm_up(self.bench, case, adapters)
        for number in range(1, self._args.rounds + 1):
            if number > 1 and self.overdue:
                break
            for adapters in outcomes:
                outcome = self.bench.outcome(case, adapters)
                outcomes[adapters].append(outcome)
                figures = outcome.figures()
                line = self.record.line(case, adapters, kind="run", round=number, **figures)
                self.record.append(line)
        for adapters, own in outcomes.items():
            self.rows.append(self._row(case, adapters, own, outcomes[0]))
        say("\n".join(_line(row) for row in self.rows[-len(outcomes) :]))

    def measure_uploads(self, case: Case) -> None:
        """One run without and one with uploads, of the most adapters."""
        from shoal.server.offline_uploads import Uploads

        adapters = self._counts(case)[-1]
        found: dict[str, Any] = {"case": str(case), "per_minute": self._args.uploads}
        quiet = self.bench.outcome(case, adapters)
        with Uploads(self.bench.engine, self._args.uploads) as uploads:
            busy = self.bench.outcome(case, adapters, loads=uploads.take)
            found["count"] = uploads.count
        for name, outcome in (("without", quiet), ("with", busy)):
            found[name] = {
                "output_tok_s": outcome.figures()["output_tok_s"],
                "p50_ms": outcome.step_ms(0.5),
                "p99_ms": outcome.step_ms(0.99),
            }
        found["same_tokens"] = quiet.tokens == busy.tokens
        self.uploads = found
        self.record.append(self.record.line(case, adapters, kind="uploads", uploads=found))
        say(f"uploads: {json.dumps(found)}")

    def profile(self, case: Case) -> None:
        """Where a decode step's time goes, for the base and the most adapters."""
        for adapters in sorted({0, *self._counts(case)[-1:]}):
            row = next(r for r in self.rows if (r["case"], r["adapters"]) == (str(case), adapters))
            found = self.bench.profile(case, adapters)
            row["split"] = split(found, row["step_ms"])
            print(profile_tables(f"{case}, {adapters} adapters", found), flush=True)
            figures = {"step_ms": row["step_ms"], "split": row["split"]}
            self.record.append(self.record.line(case, adapters, kind="profile", **figures))

    def _counts(self, case: Case) -> list[int]:
        """Numbers of adapters; there cannot be more different ones than requests."""
        return sorted({min(wanted, case.requests) for wanted in self._args.adapters} - {0})

    def _row(
        self, case: Case, adapters: int, own: Sequence[Outcome], base: Sequence[Outcome]
    ) -> dict[str, Any]:
        figures = medians([outcome.figures() for outcome in own])
        ratios = [o.output_tokens / o.wall_s for o in own]
        ratios = [r * b.wall_s / b.output_tokens for r, b in zip(ratios, base, strict=True)]
        rows = figures["decode_rows"]
        return {
            "case": str(case),
            "adapters": adapters,
            **figures,
            "ratio_to_base": round(statistics.median(ratios), 4),
            "ratios": [round(ratio, 4) for ratio in ratios],
            **bounds(self.bench.engine, figures, min(adapters, rows), self._copy_rate),
            # All of them, when adapters act.
            "changed_requests": _differing(own[0], base[0]) if adapters else 0,
            # None, when nothing depends on chance.
            "unsteady_requests": _differing(own[0], own[-1]),
        }


def _differing(one: Outcome, other: Outcome) -> int:
    return sum(tokens != other.tokens[name] for name, tokens in one.tokens.items())


HEADER = (
    f"{'case':<14}{'adapters':>9}{'tok/s':>9}{'of base':>9}{'step ms':>9}{'p99':>8}{'bound':>8}"
    f"{'% bound':>9}{'CPU ms':>8}{'wait ms':>9}{'prefill s':>11}{'changed':>9}{'unsteady':>10}"
)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    return "\n".join([HEADER, *(_line(row) for row in rows)])


def _line(row: dict[str, Any]) -> str:
    def number(name: str, places: int) -> str:
        return "-" if row[name] is None else f"{row[name]:.{places}f}"

    return (
        f"{row['case']:<14}{row['adapters']:>9}{number('output_tok_s', 0):>9}"
        f"{number('ratio_to_base', 3):>9}{number('step_ms', 3):>9}"
        f"{number('step_p99_ms', 2):>8}{number('bound_ms', 2):>8}"
        f"{number('of_bound', 1):>9}{number('host_ms', 2):>8}{number('wait_ms', 2):>9}"
        f"{number('prefill_s', 2):>11}{row['changed_requests']:>9}{row['unsteady_requests']:>10}"
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m shoal.loadtests.matrix",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--cases",
        type=_cases,
        default="256x128x128",
        help="REQUESTSxINPUTxOUTPUT, separated by commas; the first ones matter most",
    )
    parser.add_argument(
        "--adapters",
        type=_counts,
        default="1,32,256",
        help="how many different ones are in use, separated by commas; 0: only the base",
    )
    parser.add_argument("--budget-s", type=float, default=300.0, help="no case begins after this")
    parser.add_argument(
        "--uploads", type=positive, help="also run the first case with so many uploads a minute"
    )
    add_engine_arguments(parser, model_shape="llama-3.1-8b")
    return parser.parse_args(argv)


def _cases(text: str) -> list[Case]:
    cases = []
    for part in text.split(","):
        numbers = [positive(number) for number in part.split("x")]
        if len(numbers) != 3:
            raise argparse.ArgumentTypeError(f"{part!r} must be REQUESTSxINPUTxOUTPUT")
        cases.append(Case(*numbers))
    return cases


def _counts(text: str) -> list[int]:
    return [count(number) for number in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
