"""Random arrivals, aborts, deadlines, tenants, adapter churn, preemption and failures through the
real scheduler.

Everything follows from the seed in the test's id. The fake runner's tokens depend on every KV
cell and slot that a row reads, so one wrong block anywhere shows as a wrong token.
"""

from collections import Counter, deque
from dataclasses import dataclass, field, replace
from itertools import pairwise
from random import Random

import pytest

from shoal.adapters.slots import SlotTable
from shoal.adapters.spec import AdapterSpec
from shoal.server.engine.plan import UNKNOWN_TOKEN, Pending, Row, StepPlan, StepResult
from shoal.server.engine.request import FinishReason, Request, SamplingParams, TokenEvent
from shoal.server.engine.scheduler import Scheduler, SchedulerLimits
from shoal.server.errors import (
    DeadlineExceeded,
    EngineFailure,
    PromptTooLong,
    UnusableAdapter,
)
from shoal.server.model.fake import FakeRunner

VOCAB = 4096
EOS = frozenset(range(0, VOCAB, 40))  # one token in forty ends a request
SEEDS = range(200)


@dataclass
class Step:
    """A plan under way. ``pending`` is None when it failed at once."""

    plan: StepPlan
    pending: Pending | None
    fails: bool


@dataclass
class Simulation:
    """One seeded run; ``events`` keeps all that happened to each accepted request.

    ``random`` makes the requests, which are the same whatever the scheduler does with them;
    ``chance`` makes everything else.
    """

    random: Random
    chance: Random
    scheduler: Scheduler
    slots: SlotTable
    runner: FakeRunner
    troubles: bool = True
    requests: dict[str, Request] = field(default_factory=dict)
    events: dict[str, list[TokenEvent]] = field(default_factory=dict)
    adapters: dict[int, AdapterSpec] = field(default_factory=dict)
    prefixes: list[tuple[int, ...]] = field(default_factory=list)
    under_way: deque[Step] = field(default_factory=deque)
    seen: Counter[str] = field(default_factory=Counter)
    now_s: float = 0.0

    def run(self, arrivals: int) -> None:
        steps_max = 2 if self.runner.lookahead else 1
        while len(self.requests) < arrivals or self.scheduler.has_work or self.under_way:
            for _ in range(self.chance.choice((0, 0, 1, 1, 2, 5))):
                if len(self.requests) < arrivals:
                    self.arrive()
            self.maybe_abort(0.05)
            self.pass_time()
            while len(self.under_way) < steps_max and self.begin():
                self.maybe_abort(0.03)
                if self.chance.random() < 0.1:
                    break
            if self.under_way:
                self.land()

    def pass_time(self) -> None:
        self.now_s += 1.0
        # A clock that goes back now and then ends nobody twice, and nobody early.
        told = self.now_s - (50.0 if self.chance.random() < 0.05 else 0.0)
        events = self.scheduler.tick(told)
        for event in events:
            deadline_s = self.requests[event.request_id].deadline_s
            assert deadline_s is not None
            assert deadline_s <= self.now_s
        self.take(events)
        self.scheduler.check()

    def begin(self) -> bool:
        plan = self.scheduler.plan()
        self.scheduler.check()
        if plan is None:
            assert self.under_way or not self.scheduler.has_work
            return False
        self.check_plan(plan)
        self.submit(plan)
        return True

    def submit(self, plan: StepPlan) -> None:
        fate = self.chance.random() if self.troubles else 1.0
        if fate < 0.02:  # refused
            self.under_way.append(Step(plan, None, fails=True))
            while self.under_way:
                self.land()
        elif fate < 0.05:  # the device dies half-way
            rows = plan.rows[: self.chance.randrange(len(plan.rows))]
            loads = plan.adapter_loads
            ahead = plan.prefetches
            if self.chance.random() < 0.5:
                loads, rows = loads[: self.chance.randrange(len(loads) + 1)], ()
                ahead = ahead[: self.chance.randrange(len(ahead) + 1)]
            done = replace(plan, rows=rows, adapter_loads=loads, prefetches=ahead)
            self.under_way.append(Step(plan, self.runner.submit(done), fails=True))
        else:
            self.under_way.append(Step(plan, self.runner.submit(plan), fails=False))

    def land(self) -> None:
        step = self.under_way.popleft()
        result = step.pending.wait() if step.pending else StepResult(token_ids={})
        # Only what nobody waits for may read what a failed step has not written.
        assert all(self.has_ended(name) for name in result.failed), result.failed
        self.seen["ignored"] += sum(self.has_ended(row.request_id) for row in step.plan.rows)
        if step.fails:
            self.seen["failures under a step"] += bool(self.under_way)
            self.take(self.scheduler.fail(step.plan, EngineFailure("planted")))
        else:
            if self.troubles and self.chance.random() < 0.03:  # one row comes out non-finite
                name = self.chance.choice(step.plan.rows).request_id
                tokens = {k: v for k, v in result.token_ids.items() if k != name}
                result = StepResult(token_ids=tokens, failed={name: "planted"})
            self.take(self.scheduler.commit(step.plan, result))
        self.scheduler.check()

    def has_ended(self, name: str) -> bool:
        return any(e.finish_reason or e.error for e in self.events[name][-1:])

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
        weight = self.chance.choice((1, 1, 3))
        tenant = self.chance.choice(("", "", "a", "b", "c"))
        request = replace(request, tenant=tenant, weight=weight)
        # Those that go on past ends of sequence run for longer.
        if self.troubles and self.chance.random() < (0.3 if request.sampling.ignore_eos else 0.1):
            request = replace(request, deadline_s=self.now_s + self.chance.choice((0, 10, 30, 60)))
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
        if self.troubles and self.requests and self.chance.random() < chance:
            name = self.chance.choice(list(self.requests))
            self.take([event] if (event := self.scheduler.abort(name)) else [])
            self.scheduler.check()

    def take(self, events: list[TokenEvent]) -> None:
        for event in events:
            self.events[event.request_id].append(event)

    def check_plan(self, plan: StepPlan) -> None:
        limits = self.scheduler.limits
        self.seen["loads"] += len(plan.adapter_loads) + len(plan.prefetches)
        self.seen["prefetches"] += len(plan.prefetches)
        mine = {row.adapter.spec.digest for row in plan.rows if row.adapter is not None}
        assert {load.adapter.spec.digest for load in plan.adapter_loads} <= mine
        self.seen["plans ahead"] += bool(self.under_way)
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
        for row in plan.rows:
            self.check_row(row)
        self.check_beside_older(plan)

    def check_row(self, row: Row) -> None:
        """A row counts the token under way, which it may take as its input, and nothing more."""
        sampling = row.sampling
        before = [r for s in self.under_way for r in s.plan.rows if r.request_id == row.request_id]
        unknown = sum(r.sample for r in before)
        delivered = sum(len(event.token_ids) for event in self.events[row.request_id])
        assert row.output_tokens == delivered + unknown < sampling.max_tokens
        assert (UNKNOWN_TOKEN in row.token_ids) == bool(unknown)
        assert not (unknown and sampling.presence_penalty), "its history is not known"
        early = row.sample and row.output_tokens < sampling.min_tokens
        stops = sampling.stop_token_ids | (frozenset() if sampling.ignore_eos else EOS)
        assert row.suppressed_ids == (tuple(sorted(stops)) if early else ())
        if before:
            assert row.start == before[-1].start + len(before[-1].token_ids)

    def check_beside_older(self, plan: StepPlan) -> None:
        """Lanes belong to one request, and what older plans use is neither moved nor written."""
        older = [row for step in self.under_way for row in step.plan.rows]
        owners: dict[int, str] = {}
        for row in (*older, *plan.rows):
            assert 0 <= row.lane < self.scheduler.limits.max_num_seqs
            assert owners.setdefault(row.lane, row.request_id) == row.request_id, "a lane is shared"
        assert len(set(owners.values())) == len(owners), "a request has two lanes"
        users: dict[int, set[str]] = {}
        for row in older:
            for block_id in row.block_ids:
                users.setdefault(block_id, set()).add(row.request_id)
        block_tokens = self.scheduler.limits.block_tokens
        for row in plan.rows if older else ():
            for block_id in row.block_ids[row.start // block_tokens :]:
                assert users.get(block_id, set()) <= {row.request_id}, "written under a step"
        for load in (*plan.adapter_loads, *plan.prefetches):
            slot, digest = load.adapter.slot, load.adapter.spec.digest
            for row in older:
                if row.adapter is not None and row.adapter.spec.digest != digest:
                    place = row.adapter.slot
                    assert (
                        place.unit + place.num_units <= slot.unit
                        or slot.unit + slot.num_units <= place.unit
                    ), "an adapter is replaced under a step"

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
            cut = (FinishReason.ABORT, FinishReason.DEADLINE)
            if isinstance(final[0].error, DeadlineExceeded):
                assert not tokens
            if final[0].error is not None or final[0].finish_reason in cut:
                assert tokens == expected[: len(tokens)]
            else:
                assert (tokens, final[0].finish_reason) == (expected, reason), name


def make(seed: int, *, lookahead: bool, troubles: bool = True) -> Simulation:
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
        recorded_prompts=Random(f"prompts {seed}").choice((None, (1, 100), (2, 16), (4, 8))),
    )
    slots = SlotTable(rng.choice((4, 6, 12, 40)), unit_elements=8)
    prefixes = [tuple(rng.randrange(VOCAB) for _ in range(40)) for _ in range(3)]
    return Simulation(
        random=rng,
        chance=Random(f"chance {seed}"),
        scheduler=Scheduler(limits, slots, EOS),
        slots=slots,
        runner=FakeRunner(VOCAB, block_tokens, lookahead=lookahead),
        troubles=troubles,
        prefixes=prefixes,
    )


@pytest.mark.parametrize("lookahead", [False, True], ids=["in turn", "ahead"])
@pytest.mark.parametrize("seed", SEEDS)
def test_every_accepted_request_ends_once_with_the_right_tokens(seed: int, lookahead: bool) -> None:
    simulation = make(seed, lookahead=lookahead)
    simulation.run(arrivals=24)
    simulation.check_ends()
    stats = simulation.scheduler.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
    assert simulation.slots.num_pinned == 0
    tokens = [token for all_ in simulation.events.values() for e in all_ for token in e.token_ids]
    assert stats.generation_tokens_total == len(tokens)


@pytest.mark.parametrize("seed", SEEDS[:50])
def test_looking_ahead_changes_no_request(seed: int) -> None:
    def ends(lookahead: bool) -> dict[str, tuple[list[int], FinishReason | None]]:
        simulation = make(seed, lookahead=lookahead, troubles=False)
        simulation.run(arrivals=30)
        assert bool(simulation.seen["plans ahead"]) == lookahead
        return {
            name: ([token for e in events for token in e.token_ids], events[-1].finish_reason)
            for name, events in simulation.events.items()
        }

    assert ends(True) == ends(False)


@pytest.mark.parametrize("lookahead", [False, True], ids=["in turn", "ahead"])
def test_the_simulation_reaches_what_it_claims_to_test(lookahead: bool) -> None:
    seen: Counter[str] = Counter()
    for seed in range(0, 200, 6):
        simulation = make(seed, lookahead=lookahead)
        simulation.run(arrivals=40)
        stats = simulation.scheduler.stats()
        seen += simulation.seen
        seen["preemptions"] += stats.preemptions_total
        seen["hits"] += stats.prefix_cache_hits
        seen["reloads"] += simulation.seen["loads"] - stats.adapters_resident
        for events in simulation.events.values():
            last = events[-1]
            seen[type(last.error).__name__ if last.error else str(last.finish_reason)] += 1
    outcomes = ("stop", "length", "abort", "deadline", "PromptTooLong", "UnusableAdapter")
    outcomes += ("EngineFailure", "DeadlineExceeded")
    ahead = ("plans ahead", "ignored", "failures under a step") if lookahead else ()
    for name in ("preemptions", "hits", "reloads", "prefetches", *outcomes, *ahead):
        assert seen[name] >= 5, (name, seen)


def test_same_seed_same_history() -> None:
    def history() -> list[tuple[str, tuple[int, ...]]]:
        simulation = make(3, lookahead=True)
        simulation.run(arrivals=40)
        return [
            (name, event.token_ids) for name, all_ in simulation.events.items() for event in all_
        ]

    assert history() == history()
