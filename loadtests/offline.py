"""``shoal bench offline``: the engine alone, without HTTP, on a named shape and random weights.

All requests are given at once and run to their last token through the real scheduler and runner.
The base runs beside the adapters, in turns, in the same process. It owns the workload, the clock
and the report; ``shoal.server.offline`` makes the engine (and imports torch: only ``run`` does).
"""

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.server.engine.plan import Runner, StepPlan
from shoal.server.engine.request import Request, SamplingParams
from shoal.server.engine.scheduler import Scheduler
from shoal.server.model.shapes import SHAPES

if TYPE_CHECKING:
    from shoal.server.offline import OfflineEngine
    from shoal.server.profiling import Cost, Profile

WARMUP_TOKENS = 4
PROFILED_STEPS = 5
COSTS_SHOWN = 14
BASE, ADAPTERS = "base", "adapters"


@dataclass(frozen=True, slots=True)
class Step:
    """One step's rows and tokens, and the seconds of its three parts."""

    rows: int
    tokens: int
    plan_s: float
    run_s: float
    commit_s: float

    @property
    def decodes(self) -> bool:
        """Whether it had no prompt tokens (a one-token prompt counts as decoding)."""
        return self.rows == self.tokens

    @property
    def total_s(self) -> float:
        return self.plan_s + self.run_s + self.commit_s


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run of the whole workload."""

    wall_s: float
    steps: tuple[Step, ...]
    tokens: dict[str, tuple[int, ...]]

    @property
    def output_tokens(self) -> int:
        """Tokens that came out, counted."""
        return sum(map(len, self.tokens.values()))

    def full_decodes(self) -> list[Step]:
        """The decode steps of as many rows as the largest one has."""
        decodes = [step for step in self.steps if step.decodes]
        most = max((step.rows for step in decodes), default=0)
        return [step for step in decodes if step.rows == most]

    def figures(self) -> dict[str, Any]:
        """Throughput and step times, milliseconds; a decode step's figures are medians."""
        decodes = self.full_decodes()
        prompts = [step for step in self.steps if not step.decodes]

        def median_ms(seconds: Sequence[float]) -> float | None:
            return round(statistics.median(seconds) * 1e3, 3) if seconds else None

        return {
            "output_tok_s": round(self.output_tokens / self.wall_s, 1),
            "step_ms": median_ms([step.total_s for step in decodes]),
            "output_tokens": self.output_tokens,
            "wall_s": round(self.wall_s, 3),
            "decode_rows": decodes[0].rows if decodes else 0,
            "decode_steps": sum(step.decodes for step in self.steps),
            "prefill_steps": len(prompts),
            "prefill_step_ms": median_ms([step.total_s for step in prompts]),
            "prefill_s": round(sum(step.total_s for step in prompts), 3),
            "plan_ms": median_ms([step.plan_s for step in decodes]),
            "run_ms": median_ms([step.run_s for step in decodes]),
            "commit_ms": median_ms([step.commit_s for step in decodes]),
        }


class RunFailed(RuntimeError):
    """A request ended with an error, or not with the tokens it asked for."""


class Driver:
    """Steps one engine through a workload, without a thread, and takes the time."""

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.tokens: dict[str, list[int]] = {}

    def add(self, requests: Sequence[Request]) -> None:
        """Hand over requests.

        Raises:
            RunFailed: the scheduler refused one.
        """
        for request in requests:
            refused = self.scheduler.add(request)
            if refused is not None:
                raise RunFailed(f"request {request.id} was refused: {refused.error}")
            self.tokens[request.id] = []

    def step(self) -> Step:
        """Plan, execute and commit one step.

        Raises:
            RunFailed: a request failed.
        """
        begin = time.perf_counter()
        plan = self.scheduler.plan()
        assert plan is not None, "nothing is left to do"
        planned = time.perf_counter()
        result = self.runner.submit(plan).wait()
        ran = time.perf_counter()
        for event in self.scheduler.commit(plan, result):
            if event.error is not None:
                raise RunFailed(f"request {event.request_id} failed: {event.error}")
            self.tokens[event.request_id].extend(event.token_ids)
        done = time.perf_counter()
        return _measured(plan, planned - begin, ran - planned, done - ran)


def _measured(plan: StepPlan, plan_s: float, run_s: float, commit_s: float) -> Step:
    return Step(len(plan.rows), plan.num_tokens, plan_s, run_s, commit_s)


class Bench:
    """The workload of one call, and both engines to run it on."""

    def __init__(self, engine: "OfflineEngine", args: argparse.Namespace) -> None:
        self.engine = engine
        self.args = args

    def outcome(self, side: str, output: int) -> Outcome:
        """Run every request to ``output`` tokens."""
        driver = self._driver(side, output)
        self.engine.synchronize()
        begin = time.perf_counter()
        steps = []
        while driver.scheduler.has_work:
            steps.append(driver.step())
        self.engine.synchronize()
        wall = time.perf_counter() - begin
        short = {name: len(t) for name, t in driver.tokens.items() if len(t) != output}
        if short:
            name, count = next(iter(short.items()))
            raise RunFailed(f"request {name} ended after {count} of {output} tokens")
        return Outcome(wall, tuple(steps), {k: tuple(v) for k, v in driver.tokens.items()})

    def profile(self, side: str) -> "Profile":
        """A few decode steps of all rows under the profiler."""
        from shoal.server.profiling import profile_steps

        driver = self._driver(side, profiled_output(self.args))
        while not driver.step().decodes:
            pass
        found = profile_steps(driver.step, PROFILED_STEPS, self.engine.device)
        while driver.scheduler.has_work:  # so that no adapter stays pinned
            driver.step()
        return found

    def _driver(self, side: str, output: int) -> Driver:
        with_adapters = side == ADAPTERS
        runner = self.engine.runner if with_adapters else self.engine.base_runner
        driver = Driver(self.engine.scheduler(adapters=with_adapters), runner)
        driver.add(self._requests(with_adapters, output))
        return driver

    def _requests(self, with_adapters: bool, output: int) -> list[Request]:
        """Random prompts, the same for both sides; neighbours have different adapters.

        The adapters in use are spread evenly over the residents.
        """
        args, resident = self.args, self.engine.adapters
        draw = random.Random(args.seed)
        vocab = self.engine.model.vocab_size
        sampling = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
        requests = []
        for i in range(args.requests):
            prompt = tuple(draw.randrange(vocab) for _ in range(args.input))
            adapter = None
            if with_adapters:
                adapter = resident[i % args.adapters * len(resident) // args.adapters]
            requests.append(
                Request(id=str(i), prompt_ids=prompt, sampling=sampling, adapter=adapter)
            )
        return requests


def profiled_output(args: argparse.Namespace) -> int:
    """Output tokens that leave decode steps of all rows once the last prompt is in."""
    prefills: int = -(-args.requests * args.input // args.max_num_batched_tokens)
    return PROFILED_STEPS + 2 * prefills + 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    add = parser.add_argument
    add("--model-shape", choices=sorted(SHAPES), default="smollm2-135m", help="shape of the base")
    add("--requests", type=_positive, default=256, help="given all at once")
    add("--input", type=_positive, default=128, help="prompt tokens of each request")
    add("--output", type=_positive, default=128, help="output tokens of each request")
    add("--adapters", type=_count, default=0, help="different adapters in use; 0: only the base")
    add("--family", choices=("core", "fold", "lora"), default="core", help="of the adapters")
    add("--rank", type=_positive, default=16, help="of the adapters")
    add("--resident", type=_count, default=0, help="adapters in the bank; 0: those in use")
    add("--basis-rank", type=_positive, default=64, help="of the basis that core adapters share")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    add(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        default="auto",
        help="auto: float32 on a CPU, the shape's 16-bit type on CUDA",
    )
    add("--rounds", type=_positive, default=3, help="measured runs of each side, in turns")
    add("--max-num-seqs", type=_positive, default=256, help="rows in one step at most")
    add("--max-num-batched-tokens", type=_positive, default=8192, help="tokens in one step at most")
    add("--profile", action="store_true", help="also show where decode steps spend their time")
    add("--results", type=Path, metavar="FILE", help="append each measured run here, a JSON line")
    add("--commit", help="what to call the code measured; default: what git says")
    add("--seed", type=int, default=0, help="of weights, adapters and prompts")


def run(args: argparse.Namespace) -> int:
    """Measure and report; returns 0, or 2 when it cannot be done as asked."""
    from shoal.server.offline import OfflineConfig, OfflineEngine

    if args.resident and args.resident < args.adapters:
        return _error(f"--resident is {args.resident}: must be at least --adapters")
    if args.max_num_batched_tokens < args.max_num_seqs:
        return _error("--max-num-batched-tokens must be at least --max-num-seqs")
    begin = time.perf_counter()
    try:
        engine = OfflineEngine(
            OfflineConfig(
                model_shape=args.model_shape,
                device=args.device,
                dtype=args.dtype,
                family=args.family,
                rank=args.rank,
                resident=(args.resident or args.adapters) if args.adapters else 0,
                basis_rank=args.basis_rank,
                max_num_seqs=args.max_num_seqs,
                max_num_batched_tokens=args.max_num_batched_tokens,
                sequences=args.requests,
                sequence_tokens=args.input
                + max(args.output, profiled_output(args) if args.profile else 0),
                seed=args.seed,
            )
        )
    except ValueError as problem:
        return _error(str(problem))
    _say(f"built in {time.perf_counter() - begin:.1f} s on {engine.device_name()}")
    try:
        summary = _measure(Bench(engine, args), args)
    except RunFailed as problem:
        return _error(str(problem))
    print(json.dumps(summary))
    return 0


def _measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    engine = bench.engine
    sides = (BASE, ADAPTERS) if args.adapters else (BASE,)
    for side in sides:
        begin = time.perf_counter()
        bench.outcome(side, min(WARMUP_TOKENS, args.output))
        _say(f"warm-up of {side} in {time.perf_counter() - begin:.1f} s")
    conditions = _conditions(engine, args)
    outcomes: dict[str, list[Outcome]] = {side: [] for side in sides}
    for number in range(args.rounds):
        for side in sides:
            outcome = bench.outcome(side, args.output)
            outcomes[side].append(outcome)
            figures = outcome.figures()
            _say(f"round {number + 1} {side}: {figures['output_tok_s']} tok/s")
            line = {"kind": "run", "round": number + 1, **_side(conditions, side), **figures}
            _append(args.results, {**conditions, **line})
    bound_ms = engine.weight_bytes / engine.copy_bytes_per_s() * 1e3
    rows = {side: _medians([o.figures() for o in outcomes[side]]) for side in sides}
    for figures in rows.values():
        ratio = figures["output_tok_s"] / rows[BASE]["output_tok_s"]
        figures["ratio_to_base"] = round(ratio, 4)
        step_ms = figures["step_ms"]
        figures["of_bound"] = round(100 * bound_ms / step_ms, 1) if step_ms else None
    print(_table(rows, bound_ms), flush=True)
    summary = {**conditions, **_side(conditions, sides[-1]), **rows[sides[-1]]}
    summary["weight_bytes"] = engine.weight_bytes
    summary["weight_bound_ms"] = round(bound_ms, 3)
    if args.adapters:
        summary["base"] = rows[BASE]
        one, other = outcomes[BASE][-1].tokens, outcomes[ADAPTERS][-1].tokens
        summary["changed_requests"] = sum(one[name] != other[name] for name in one)
    if args.profile:
        for side in sides:
            found = bench.profile(side)
            print(_profile_tables(side, found), flush=True)
            split = _split(found, rows[side]["step_ms"])
            target = summary["base"] if side == BASE and args.adapters else summary
            target["split"] = split
            line = {"kind": "profile", **_side(conditions, side), **rows[side], "split": split}
            _append(args.results, {**conditions, **line})
    return summary


def _conditions(engine: "OfflineEngine", args: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to repeat a run, and what ties the lines of one process together."""
    return {
        "run_id": uuid.uuid4().hex[:12],
        "model_shape": args.model_shape,
        "requests": args.requests,
        "input": args.input,
        "output": args.output,
        "adapters": args.adapters,
        "family": args.family,
        "rank": args.rank,
        "resident": len(engine.adapters),
        "basis_rank": args.basis_rank,
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "seed": args.seed,
        "rounds": args.rounds,
        "commit": args.commit or _commit(),
        "gpu": engine.device_name(),
        "torch": _version("torch"),
        "triton": _version("triton"),
        "python": platform.python_version(),
    }


def _side(conditions: dict[str, Any], side: str) -> dict[str, Any]:
    """The base's lines say that it has no adapters."""
    if side == BASE:
        return {"side": side, "adapters": 0, "family": None, "rank": 0, "resident": 0}
    return {"side": side}


def _medians(figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Field by field over the rounds; the fields that count are the same in each."""
    out: dict[str, Any] = {}
    for name in figures[0]:
        values = [f[name] for f in figures if f[name] is not None]
        middle = statistics.median(values) if values else None
        out[name] = middle if middle is None or middle in values else round(middle, 3)
    return out


def _split(found: "Profile", step_ms: float | None) -> dict[str, float]:
    """Device milliseconds by part; ``gaps`` is what is left of a step without the profiler."""
    split = {f"{part}_ms": round(ms, 3) for part, ms in found.split.items()}
    if split and step_ms is not None:
        split["gaps_ms"] = round(step_ms - sum(found.split.values()), 3)
        split["launches"] = round(found.launches)
    return split


def _table(rows: dict[str, dict[str, Any]], bound_ms: float) -> str:
    columns: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
        ("output_tok_s", "tok/s", lambda v: f"{v:.0f}"),
        ("ratio_to_base", "of base", lambda v: f"{v:.3f}"),
        ("step_ms", "decode ms", lambda v: f"{v:.2f}"),
        ("plan_ms", "plan", lambda v: f"{v:.2f}"),
        ("run_ms", "run", lambda v: f"{v:.2f}"),
        ("commit_ms", "commit", lambda v: f"{v:.2f}"),
        ("of_bound", "% bound", lambda v: f"{v:.1f}"),
        ("prefill_step_ms", "prefill ms", lambda v: f"{v:.1f}"),
        ("prefill_s", "prefill s", lambda v: f"{v:.2f}"),
        ("output_tokens", "tokens", lambda v: f"{v:.0f}"),
    )
    lines = [f"{'':<9}" + "".join(f"{title:>11}" for _, title, _ in columns)]
    for side, figures in rows.items():
        cells = ((figures[key], shown) for key, _, shown in columns)
        text = "".join(f"{'-' if value is None else shown(value):>11}" for value, shown in cells)
        lines.append(f"{side:<9}{text}")
    lines.append(f"% bound: of {bound_ms:.2f} ms, the weights once at the rate of a device copy")
    return "\n".join(lines)


def _profile_tables(side: str, found: "Profile") -> str:
    parts = [f"{side}: a decode step in the profiler"]
    for title, costs in (("device kernels", found.kernels), ("CPU, own time", found.ops)):
        if costs:
            parts.append(f"{title:<58} {'ms':>8} {'calls':>7}")
            parts += [_cost_line(cost) for cost in costs[:COSTS_SHOWN]]
    return "\n".join(parts)


def _cost_line(cost: "Cost") -> str:
    name = cost.name if len(cost.name) <= 56 else cost.name[:27] + ".." + cost.name[-27:]
    return f"  {name:<56} {cost.ms:8.3f} {cost.calls:7.0f}"


def _append(path: Path | None, line: dict[str, Any]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as out:
        out.write(json.dumps(line) + "\n")


def _commit() -> str:
    """The commit of this checkout, ``-dirty`` with local changes; ``unknown`` outside one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _error(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2


def _positive(text: str) -> int:
    return _at_least(text, 1)


def _count(text: str) -> int:
    return _at_least(text, 0)


def _at_least(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {least}")
    return value
