"""``python -m shoal.adapters.training.experiments TABLE``: one command per table; see README.md."""

import argparse
import importlib
import logging
import sys
import time
from pathlib import Path

from shoal.adapters.training.experiments.log import Log
from shoal.adapters.training.experiments.settings import SEEDS, STEPS
from shoal.adapters.training.experiments.tables import TABLES

SCORER = "shoal.server.evaluating.directories"
_OTHERS = {
    "data": "write the tasks' splits into --data (needs reasoning-gym)",
    "plan": "print what each table trains, and what that may cost",
    "costs": "LoRA-XS, Tables 5 and 6; MiSS, section 3.2 and Table 8: initialisation, step, memory",
    "controlled": "MiSS, Table 12: its controlled experiment",
    "all": "every table, in order",
    "score": "score what was trained and has no score",
    "report": "write RESULTS.md and its plots into --to",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m shoal.adapters.training.experiments",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(
            f"  {name:14}{text}"
            for name, text in {**{t.name: t.title for t in TABLES.values()}, **_OTHERS}.items()
        ),
    )
    made.add_argument("what", choices=(*TABLES, *_OTHERS), metavar="TABLE", help="see below")
    made.add_argument("--base", type=Path, help="the base model: a directory or .gguf file")
    made.add_argument("--data", type=Path, help="folder of the tasks (default: OUT/data)")
    made.add_argument("--out", type=Path, required=True, help="folder of experiments.jsonl")
    made.add_argument("--cache", type=Path, help="folder of the base's decompositions")
    made.add_argument(
        "--budget-s", type=float, default=float("inf"), help="stop before so many seconds are over"
    )
    made.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    made.add_argument("--steps", type=int, default=STEPS, help="updates of a run")
    made.add_argument(
        "--seeds",
        type=lambda text: tuple(int(part) for part in text.split(",")),
        default=SEEDS,
        help="of the runs that count (default: 1,2,3)",
    )
    made.add_argument("--limit", type=int, help="test items asked of an adapter (default: all)")
    made.add_argument("--scorer", default=SCORER, help="module whose open_source scores")
    made.add_argument("--no-score", action="store_true", help="train only")
    made.add_argument("--commit", default="", help="of this copy (default: as git says)")
    made.add_argument("--keep", action="store_true", help="keep the directories of scored runs")
    made.add_argument(
        "--to", type=Path, default=Path("adapters/training"), help="where the report goes"
    )
    return made


def main(arguments: list[str] | None = None) -> int:
    """0: all that was asked for is there. 3: the budget ended before. 2: it was refused.

    130: a signal ended it; what is in the log stays.
    """
    started = time.monotonic()
    args = parser().parse_args(arguments)
    logging.basicConfig(level="WARNING", format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("shoal.adapters.training.experiments").setLevel("INFO")
    args.data = args.data or args.out / "data"
    from shoal.adapters.training.errors import TrainingError

    try:
        return _run(args, started + args.budget_s)
    except TrainingError as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(args: argparse.Namespace, deadline: float) -> int:
    if args.what == "data":
        from shoal.adapters.training.experiments.tasks import write_all

        write_all(args.data)
        return 0
    if args.what == "plan":
        from shoal.adapters.training.experiments.plan import plan

        print(plan(TABLES.values()))
        return 0
    log = Log(args.out / "experiments.jsonl")
    if args.what == "report":
        from shoal.adapters.training.experiments.report import write_report

        for path in write_report(log, args.to, seeds=args.seeds, steps=args.steps):
            print(path)
        return 0
    return _measure(args, log, deadline)


def _measure(args: argparse.Namespace, log: Log, deadline: float) -> int:
    """Everything that trains."""
    from platformdirs import user_cache_path
    from transformers.utils.logging import disable_progress_bar

    from shoal.adapters.training.experiments import driver
    from shoal.adapters.training.experiments.base import directory_of
    from shoal.adapters.training.experiments.controlled import run_all
    from shoal.adapters.training.experiments.costs import measure_costs
    from shoal.adapters.training.experiments.place import tell_commit
    from shoal.adapters.training.experiments.running import Lab
    from shoal.adapters.training.experiments.scoring import OpenSource
    from shoal.adapters.training.experiments.tasks import missing

    disable_progress_bar()
    tell_commit(args.commit)
    clock = driver.Clock(deadline)
    complete = True
    if args.what in ("controlled", "all"):
        run_all(log)
    if args.what == "controlled":
        return 0
    absent = missing(args.data)
    if args.base is None or absent:
        wanted = "--base" if args.base is None else f"{absent[0]}; make it with `data`"
        print(f"experiments: {args.what} needs {wanted}", file=sys.stderr)
        return 2
    lab = Lab(
        base=directory_of(args.base.resolve(), args.out / "base"),
        data=args.data,
        out=args.out,
        cache=args.cache or user_cache_path("shoal") / "bases",
        device=args.device,
        steps=args.steps,
        seeds=args.seeds,
        log=log,
    )
    open_source: OpenSource | None = None
    if not args.no_score:
        open_source = importlib.import_module(args.scorer).open_source
    if args.what == "score" and open_source is not None:
        complete = driver.score(lab, open_source, clock, limit=args.limit, keep=args.keep)
    if args.what in ("costs", "all"):
        complete = measure_costs(lab, clock)
    names = [name for name in TABLES if args.what in (name, "all")]
    tables = [TABLES[name] for name in names]
    complete &= driver.work(lab, tables, clock, open_source, limit=args.limit, keep=args.keep)
    return 0 if complete else 3


if __name__ == "__main__":
    raise SystemExit(main())
