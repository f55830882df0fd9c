"""Random arrivals, aborts, adapter churn, preemption and failures through the real scheduler.

Everything follows from the seed in the test's id. The fake runner's tokens depend on every KV
cell and slot that a row reads, so one wrong block anywhere shows as a wrong token.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import pairwise
from random import Random

import pytest

from shoal.adapters.slots import SlotTable
from shoal.adapters.spec import AdapterSpec
from shoal.server.engine.plan import StepPlan, StepResult
from shoal.server.engine.request import FinishReason, Request, SamplingParams, TokenEvent
from shoal.server.engine.scheduler import Scheduler, SchedulerLimits
from shoal.server.errors import EngineFailure, PromptTooLong, UnusableAdapter
from shoal.server.model.fake import FakeRunner

VOCAB = 4096
EOS = frozenset(range(0, VOCAB, 40))  # one token in forty ends a request
SEEDS = range(200)


@dataclass
class Simulation:
    """One seeded run; ``events`` keeps all that happened to each accepted request."""

    random: Random
    scheduler: Scheduler
    slots: SlotTable
    runner: FakeRunner
    requests: dict[str, Request] = field(default_factory=dict)
    events: dict[str, list[TokenEvent]] = field(default_factory=dict)
    adapters: dict[int, AdapterSpec] = field(default_factory=dict)
    prefixes: list[tuple[int, ...]] = field(default_factory=list)
    loads: int = 0

    def run(self, arrivals: int) -> None:
        while len(self.requests) < arrivals or self.scheduler.has_work:
            for _ in range(self.random.choice((0, 0, 1, 1, 2, 5))):
                if len(self.requests) < arrivals:
                    self.arrive()
            self.maybe_abort(0.05)
            plan = self.scheduler.plan()
            if plan is None:
                assert not self.scheduler.has_work
                continue
            self.check_plan(plan)
            self.maybe_abort(0.05)
            self.scheduler.check()
            self.execute(plan)
            self.scheduler.check()

    def arrive(self) -> None:
        rng = self.random
        prefix = rng.choice(self.prefixes)[: rng.randrange(30)]
        tail = tuple(rng.randrange(VOCAB) for _ in range(rng.choice((0, 1, 1, 5, 20))))
        request = Request(
            id=f"r{len(self.requests)}",
            prompt_ids=(prefix + tail) or (7,),
            adapter=self.pick_adapter(),
            sampling=SamplingParams(
                max_tokens=rng.choice((1, 3, 8, 25)),
                ignore_eos=rng.random() < 0.3,
                min_tokens=rng.choice((0, 0, 0, 4)),
                stop_token_ids=frozenset(rng.sample(range(VOCAB), rng.choice((0, 0, 50)))),
                presence_penalty=rng.choice((0.0, 0.0, 0.5)),
            ),
        )
        self.requests[request.id] = request
        self.events[request.id] = []
        self.take([event] if (event := self.scheduler.add(request)) else [])

    def pick_adapter(self) -> AdapterSpec | None:
        rng = self.random
        if rng.random() < 0.25:
            return None
        name = min(rng.randrange(12), rng.randrange(12))
        if name not in self.adapters or rng.random() < 0.1:  # uploaded, or replaced
            size = rng.choice((1, 8, 9, 16, 30, 30, 500))
            digest = f"{name}-{rng.getrandbits(64):x}"
            self.adapters[name] = AdapterSpec(digest, rng.choice(("core", "fold")), 4, None, size)
        return self.adapters[name]

    def maybe_abort(self, chance: float) -> None:
        if self.requests and self.random.random() < chance:
            name = self.random.choice(list(self.requests))
            self.take([event] if (event := self.scheduler.abort(name)) else [])

    def execute(self, plan: StepPlan) -> None:
        fate = self.random.random()
        if fate < 0.03:  # the device dies half-way
            done = self.random.randrange(len(plan.rows))
            loaded = self.random.randrange(len(plan.adapter_loads) + 1)
            if loaded == len(plan.adapter_loads):
                self.runner.submit(replace(plan, rows=plan.rows[:done])).wait()
            else:
                self.runner.submit(
                    replace(plan, rows=(), adapter_loads=plan.adapter_loads[:loaded])
                ).wait()
            self.take(self.scheduler.fail(plan, EngineFailure("planted")))
            return
        result = self.runner.submit(plan).wait()
        if fate < 0.06:  # one row comes out non-finite
            name = self.random.choice(plan.rows).request_id
            tokens = {k: v for k, v in result.token_ids.items() if k != name}
            result = StepResult(token_ids=tokens, failed={name: "planted"})
        self.take(self.scheduler.commit(plan, result))

    def take(self, events: list[TokenEvent]) -> None:
        for event in events:
            self.events[event.request_id].append(event)

    def check_plan(self, plan: StepPlan) -> None:
        limits = self.scheduler.limits
        self.loads += len(plan.adapter_loads)
        assert len(plan.rows) <= limits.max_num_seqs
        assert plan.num_tokens <= limits.max_num_batched_tokens
        lengths = [len(row.token_ids) > 1 for row in plan.rows]
        assert lengths == sorted(lengths), "one-token rows come first"
        for part in (False, True):
            digests = [
                row.adapter.spec.digest if row.adapter else None
                for row in plan.rows
                if (len(row.token_ids) > 1) == part
            ]
            changes = sum(a != b for a, b in pairwise(digests))
            assert changes == max(0, len(set(digests)) - 1), "an adapter's rows are neighbours"
        written = Counter(
            row.block_ids[position // limits.block_tokens] * limits.block_tokens
            + position % limits.block_tokens
            for row in plan.rows
            for position in range(row.start, row.start + len(row.token_ids))
        )
        assert set(written.values()) == {1}, "two rows write one position"

    def oracle(self, request: Request) -> tuple[list[int], FinishReason]:
        sampling, limits = request.sampling, self.scheduler.limits
        room = min(limits.max_model_len, limits.num_blocks * limits.block_tokens + 1)
        count = min(sampling.max_tokens, room - len(request.prompt_ids))
        stops = sampling.stop_token_ids | (frozenset() if sampling.ignore_eos else EOS)
        tokens = self.runner.expected(
            request.prompt_ids,
            request.adapter.digest if request.adapter else None,
            count,
            suppressed_ids=stops,
            min_tokens=sampling.min_tokens,
        )
        for index, token in enumerate(tokens):
            if token in stops:
                return tokens[: index + 1], FinishReason.STOP
        return tokens, FinishReason.LENGTH

    def check_ends(self) -> None:
        for name, request in self.requests.items():
            events = self.events[name]
            final = [e for e in events if e.error is not None or e.finish_reason is not None]
            assert final == events[-1:], f"{name} ended {len(final)} times"
            tokens = [token for event in events for token in event.token_ids]
            if isinstance(final[0].error, PromptTooLong | UnusableAdapter):
                assert not tokens
                continue
            expected, reason = self.oracle(request)
            if final[0].error is not None or final[0].finish_reason is FinishReason.ABORT:
                assert tokens == expected[: len(tokens)]
            else:
                assert (tokens, final[0].finish_reason) == (expected, reason), name


def make(seed: int) -> Simulation:
    rng = Random(seed)
    block_tokens = rng.choice((1, 2, 4, 8))
    seqs = rng.choice((1, 2, 4, 8, 16))
    limits = SchedulerLimits(
        block_tokens=block_tokens,
        num_blocks=max(2, rng.choice((40, 60, 120, 400)) // block_tokens),
        max_num_seqs=seqs,
        max_num_batched_tokens=seqs + rng.choice((0, 1, 7, 30, 100)),
        max_model_len=rng.choice((45, 64, 10_000)),
        max_waiting=1000,
        vocab_size=VOCAB,
    )
    slots = SlotTable(rng.choice((4, 6, 12, 40)), unit_elements=8)
    prefixes = [tuple(rng.randrange(VOCAB) for _ in range(40)) for _ in range(3)]
    runner = FakeRunner(VOCAB, block_tokens)
    return Simulation(rng, Scheduler(limits, slots, EOS), slots, runner, prefixes=prefixes)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_accepted_request_ends_once_with_the_right_tokens(seed: int) -> None:
    simulation = make(seed)
    simulation.run(arrivals=30)
    simulation.check_ends()
    stats = simulation.scheduler.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
    assert simulation.slots.num_pinned == 0


def test_the_simulation_reaches_what_it_claims_to_test() -> None:
    seen: Counter[str] = Counter()
    for seed in range(0, 200, 20):
        simulation = make(seed)
        simulation.run(arrivals=40)
        stats = simulation.scheduler.stats()
        seen["preemptions"] += stats.preemptions_total
        seen["hits"] += stats.prefix_cache_hits
        seen["reloads"] += simulation.loads - stats.adapters_resident
        for events in simulation.events.values():
            last = events[-1]
            seen[type(last.error).__name__ if last.error else str(last.finish_reason)] += 1
    outcomes = ("stop", "length", "abort", "PromptTooLong", "UnusableAdapter", "EngineFailure")
    for name in ("preemptions", "hits", "reloads", *outcomes):
        assert seen[name] >= 5, (name, seen)


def test_same_seed_same_history() -> None:
    def history() -> list[tuple[str, tuple[int, ...]]]:
        simulation = make(3)
        simulation.run(arrivals=40)
        return [
            (name, event.token_ids) for name, all_ in simulation.events.items() for event in all_
        ]

    assert history() == history()
