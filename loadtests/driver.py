"""Runs one workload on one engine in this process, step by step, and takes the time.

``Driver`` looks ahead as ``EngineLoop`` does, without a thread: the next step is planned and
submitted before the one under way is waited for. ``Bench`` makes the requests. It owns the clock;
what is printed or kept is for its callers, and ``shoal.server.offline`` makes the engine (and
imports torch: nothing here does).
"""

import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from shoal.loadtests.stats import percentile
from shoal.server.engine.plan import AdapterLoad, Pending, Runner, StepPlan
from shoal.server.engine.request import Request, SamplingParams
from shoal.server.engine.scheduler import FLIGHTS_MAX, Scheduler

if TYPE_CHECKING:
    from shoal.server.offline import OfflineEngine
    from shoal.server.profiling import Profile

PROFILED_STEPS = 3
# Decode steps of all rows in a warm-up: one captures a graph, the next replays it.
WARM_STEPS = 3

Loads = Callable[[], tuple[AdapterLoad, ...]]


class Case(NamedTuple):
    """A workload: so many requests, given at once, of so many prompt and output tokens."""

    requests: int
    input: int
    output: int

    def __str__(self) -> str:
        return f"{self.requests}x{self.input}x{self.output}"


@dataclass(frozen=True, slots=True)
class Step:
    """One step's rows and tokens, and where its seconds went.

    Attributes:
        positions: cached positions that all rows together see.
        plan_s, submit_s, commit_s: of the CPU.
        wait_s: how long the CPU had nothing to do but to wait for this step.
        total_s: from the landing of the step before, or from its own planning if that was later.
    """

    rows: int
    tokens: int
    positions: int
    plan_s: float
    submit_s: float
    wait_s: float
    commit_s: float
    total_s: float

    @property
    def decodes(self) -> bool:
        """Whether it had no prompt tokens (a one-token prompt counts as decoding)."""
        return self.rows == self.tokens

    @property
    def host_s(self) -> float:
        """What the CPU did for it; a shorter step is not possible, however fast the device."""
        return self.plan_s + self.submit_s + self.commit_s


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

    def step_ms(self, q: float) -> float | None:
        """Milliseconds that so much of the decode steps of all rows do not exceed."""
        times = sorted(step.total_s * 1e3 for step in self.full_decodes())
        return round(percentile(times, q), 3) if times else None

    def figures(self) -> dict[str, Any]:
        """Throughput and step times, milliseconds; a decode step's figures are medians."""
        decodes = self.full_decodes()
        prompts = [step for step in self.steps if not step.decodes]

        def median_ms(seconds: Sequence[float]) -> float | None:
            return round(statistics.median(seconds) * 1e3, 3) if seconds else None

        return {
            "output_tok_s": round(self.output_tokens / self.wall_s, 1),
            "step_ms": median_ms([step.total_s for step in decodes]),
            "step_p99_ms": self.step_ms(0.99),
            "output_tokens": self.output_tokens,
            "wall_s": round(self.wall_s, 3),
            "decode_rows": decodes[0].rows if decodes else 0,
            "decode_positions": int(statistics.median(s.positions for s in decodes or self.steps)),
            "decode_steps": sum(step.decodes for step in self.steps),
            "prefill_steps": len(prompts),
            "prefill_step_ms": median_ms([step.total_s for step in prompts]),
            "prefill_s": round(sum(step.total_s for step in prompts), 3),
            "plan_ms": median_ms([step.plan_s for step in decodes]),
            "submit_ms": median_ms([step.submit_s for step in decodes]),
            "wait_ms": median_ms([step.wait_s for step in decodes]),
            "commit_ms": median_ms([step.commit_s for step in decodes]),
            "host_ms": median_ms([step.host_s for step in decodes]),
        }


class RunFailed(RuntimeError):
    """A request ended with an error, or not with the tokens it asked for."""


class _UnderWay(NamedTuple):
    plan: StepPlan
    pending: Pending
    began: float
    planned: float
    submitted: float


class Driver:
    """Steps one engine through a workload.

    Args:
        loads: asked before each step for adapters to copy into the bank with it.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, loads: Loads | None = None) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.tokens: dict[str, list[int]] = {}
        self.steps: list[Step] = []
        self._loads = loads
        self._under_way: deque[_UnderWay] = deque()
        self._landed_at = 0.0

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

    def step(self, *, ahead: bool = True) -> Step:
        """Submit what may be under way at once, then wait for the oldest step.

        Args:
            ahead: False has one step under way at most.

        Raises:
            RunFailed: a request failed.
        """
        most = FLIGHTS_MAX if ahead and self.runner.lookahead else 1
        while len(self._under_way) < most and self._begin():
            pass
        assert self._under_way, "nothing is left to do"
        return self._land()

    def run(self) -> None:
        """Step until every request has ended."""
        while self.scheduler.has_work:
            self.step()
        self.land_all()

    def land_all(self) -> None:
        """Wait for what is under way."""
        while self._under_way:
            self._land()

    def abort(self) -> None:
        """End every request now, so that no adapter stays pinned."""
        for name in self.tokens:
            self.scheduler.abort(name)
        self.land_all()

    def _begin(self) -> bool:
        began = time.perf_counter()
        plan = self.scheduler.plan()
        if plan is None:
            return False
        planned = time.perf_counter()
        loads = self._loads() if self._loads is not None else ()
        # The scheduler wants its own plan back.
        asked = replace(plan, adapter_loads=plan.adapter_loads + loads) if loads else plan
        pending = self.runner.submit(asked)
        self._under_way.append(_UnderWay(plan, pending, began, planned, time.perf_counter()))
        return True

    def _land(self) -> Step:
        plan, pending, began, planned, submitted = self._under_way.popleft()
        waiting = time.perf_counter()
        result = pending.wait()
        ran = time.perf_counter()
        for event in self.scheduler.commit(plan, result):
            if event.error is not None:
                raise RunFailed(f"request {event.request_id} failed: {event.error}")
            self.tokens[event.request_id].extend(event.token_ids)
        landed = time.perf_counter()
        step = Step(
            rows=len(plan.rows),
            tokens=plan.num_tokens,
            positions=sum([row.start for row in plan.rows]) + plan.num_tokens,
            plan_s=planned - began,
            submit_s=submitted - planned,
            wait_s=ran - waiting,
            commit_s=landed - ran,
            total_s=landed - max(began, self._landed_at),
        )
        self._landed_at = landed
        self.steps.append(step)
        return step


class Bench:
    """Workloads for both sides of one engine: ``adapters`` different ones, or 0 for the base."""

    def __init__(self, engine: "OfflineEngine", seed: int) -> None:
        self.engine = engine
        self.seed = seed

    def outcome(
        self, case: Case, adapters: int, *, output: int | None = None, loads: Loads | None = None
    ) -> Outcome:
        """Run every request to its last token.

        Args:
            output: tokens of each request, if not the case's.
            loads: see ``Driver``.

        Raises:
            RunFailed: a request ended with an error, or too early.
        """
        wanted = output or case.output
        driver = self._driver(case._replace(output=wanted), adapters, loads)
        self.engine.synchronize()
        begin = time.perf_counter()
        driver.run()
        self.engine.synchronize()
        wall = time.perf_counter() - begin
        short = {name: len(t) for name, t in driver.tokens.items() if len(t) != wanted}
        if short:
            name, count = next(iter(short.items()))
            raise RunFailed(f"request {name} ended after {count} of {wanted} tokens")
        return Outcome(wall, tuple(driver.steps), {k: tuple(v) for k, v in driver.tokens.items()})

    def warm_up(self, case: Case, adapters: int) -> None:
        """The case's prompts, some decode steps of all rows, and those as the requests end.

        Steps are planned as in the whole run, up to the length of the decoding. So every kernel
        that the run launches is compiled, and every graph that it replays is captured.
        """
        config = self.engine.config
        short = _short_output(case, config.max_num_seqs, config.max_num_batched_tokens)
        self.outcome(case, adapters, output=min(case.output, short))

    def profile(self, case: Case, adapters: int) -> "Profile":
        """A few decode steps of all rows, half way through the output, under the profiler."""
        from shoal.server.profiling import profile_steps

        config = self.engine.config
        seqs, tokens = config.max_num_seqs, config.max_num_batched_tokens
        case = case._replace(output=profiled_output(case, seqs, tokens))
        driver = self._driver(case, adapters)
        while not driver.step().decodes or len(driver.tokens["0"]) < case.output // 2:
            pass
        driver.land_all()
        found = profile_steps(lambda: driver.step(ahead=False), PROFILED_STEPS, self.engine.device)
        driver.abort()
        return found

    def _driver(self, case: Case, adapters: int, loads: Loads | None = None) -> Driver:
        runner = self.engine.runner if adapters else self.engine.base_runner
        driver = Driver(self.engine.scheduler(adapters=bool(adapters)), runner, loads)
        driver.add(self._requests(case, adapters))
        return driver

    def _requests(self, case: Case, adapters: int) -> list[Request]:
        """Random prompts, the same for both sides; neighbours have different adapters.

        The adapters in use are spread evenly over the residents.
        """
        resident = self.engine.adapters
        draw = random.Random(self.seed)
        vocab = range(self.engine.model.vocab_size)
        sampling = SamplingParams(max_tokens=case.output, temperature=0.0, ignore_eos=True)
        return [
            Request(
                id=str(i),
                prompt_ids=tuple(draw.choices(vocab, k=case.input)),
                sampling=sampling,
                adapter=resident[i % adapters * len(resident) // adapters] if adapters else None,
            )
            for i in range(case.requests)
        ]


def profiled_output(case: Case, max_num_seqs: int, max_num_batched_tokens: int) -> int:
    """Output tokens with enough decode steps of all rows in the second half."""
    short = _short_output(case, max_num_seqs, max_num_batched_tokens)
    return max(case.output, 2 * (short + PROFILED_STEPS))


def _short_output(case: Case, max_num_seqs: int, max_num_batched_tokens: int) -> int:
    """Output tokens with which no request ends before the last prompt is in."""
    rows = min(case.requests, max_num_seqs)
    # Rows that decode already take their tokens from the prompts' share.
    share = max(1, max_num_batched_tokens - rows)
    return -(-rows * case.input // share) + WARM_STEPS
