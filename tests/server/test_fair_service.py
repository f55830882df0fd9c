"""What tenants get of a real scheduler over a fake device, in simulated time; integers and seeds.

The bound is theorem 4.4 of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024):
between two tenants with requests waiting throughout, service differs by at most
``2 max(w_p L_input, w_q M)``, where M is the most tokens that a running batch holds.
"""

import os
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from random import Random

import pytest

from shoal.adapters.slots import SlotTable
from shoal.adapters.spec import AdapterSpec
from shoal.server.engine.fairness import INPUT_PRICE, OUTPUT_PRICE, Backlog, FairQueue
from shoal.server.engine.plan import StepPlan, StepResult
from shoal.server.engine.request import Request, SamplingParams, TokenEvent
from shoal.server.engine.scheduler import PASSES_MAX, Scheduler, SchedulerLimits

SEEDS = range(int(os.environ.get("SHOAL_FAIR_SEEDS", "1000")))
EOS = 0
GO_ON = 1


@dataclass
class Service:
    """A scheduler, a device that takes no time, and what each tenant was given.

    ``given`` is measured from plans and events, not asked of the scheduler: prompt tokens computed
    for the first time, and tokens delivered.
    """

    scheduler: Scheduler
    random: Random
    lookahead: bool
    ends_early: float = 0.0  # chance that a token ends its request
    adapters: bool = False  # then a request may wait for something else
    given: Counter[str] = field(default_factory=Counter)
    requests: dict[str, Request] = field(default_factory=dict)
    last: dict[str, TokenEvent] = field(default_factory=dict)
    queue: dict[str, Backlog] = field(default_factory=dict)
    under_way: deque[StepPlan] = field(default_factory=deque)
    computed: Counter[str] = field(default_factory=Counter)

    def add(self, tenant: str, prompt: int, output: int, **fields: object) -> None:
        name = f"{tenant}{len(self.requests)}"
        # No two prompts begin alike, so nothing comes from the prefix cache.
        ids = (len(self.requests) + 2, *[1] * (prompt - 1))
        request = Request(
            id=name,
            prompt_ids=ids,
            sampling=SamplingParams(max_tokens=output),
            tenant=tenant,
            **fields,  # type: ignore[arg-type]
        )
        self.requests[name] = request
        assert self.scheduler.add(request) is None

    def waiting(self) -> set[str]:
        """Tenants with requests that wait."""
        for backlog in self.scheduler.backlog():
            self.queue[backlog.tenant] = backlog
        return {name for name, backlog in self.queue.items() if backlog.waiting}

    def step(self) -> set[str]:
        """Plan, and land when two are under way; the tenants that had to wait all along."""
        before = self.waiting()
        plan = self.scheduler.plan()
        throughout = before & self.waiting()
        if throughout and not self.adapters:
            self.check_work(plan)
        if plan is not None:
            self.under_way.append(plan)
            for row in plan.rows:
                prompt = len(self.requests[row.request_id].prompt_ids)
                end = min(row.start + len(row.token_ids), prompt)
                if end > self.computed[row.request_id]:
                    tenant = self.requests[row.request_id].tenant
                    self.given[tenant] += INPUT_PRICE * (end - self.computed[row.request_id])
                    self.computed[row.request_id] = end
        if self.under_way and (plan is None or len(self.under_way) == 1 + self.lookahead):
            self.land()
        return throughout

    def check_work(self, plan: StepPlan | None) -> None:
        """Nobody waits beside a lane and tokens to spare, if blocks cannot be what is missing."""
        limits = self.scheduler.limits
        most = -(-limits.max_model_len // limits.block_tokens)
        if limits.num_blocks < limits.max_num_seqs * most:
            return
        # The lane of a request that ended is free once its last step has landed.
        rows = {row.request_id for plan in self.under_way for row in plan.rows}
        lanes = self.scheduler.num_running + len(rows & self.last.keys())
        full = plan is not None and plan.num_tokens == limits.max_num_batched_tokens
        assert full or lanes == limits.max_num_seqs

    def land(self) -> None:
        plan = self.under_way.popleft()
        chance, rng = self.ends_early, self.random
        tokens = {
            row.request_id: EOS if chance and rng.random() < chance else GO_ON
            for row in plan.rows
            if row.sample
        }
        events = self.scheduler.commit(plan, StepResult(token_ids=tokens))
        for event in events:
            self.given[self.requests[event.request_id].tenant] += OUTPUT_PRICE * len(
                event.token_ids
            )
            if event.finish_reason is not None or event.error is not None:
                assert event.request_id not in self.last, "ended twice"
                self.last[event.request_id] = event


@dataclass
class Case:
    """What follows from a seed."""

    service: Service
    tenants: dict[str, int]  # -> weight
    longest_prompt: int
    longest_output: int

    @property
    def bound(self) -> float:
        """For service divided by weight.

        Since its last start, when its counter was the smallest, a tenant was charged for that
        request's prompt, and for what all its rows could still make. Prompts are charged when they
        start and computed in chunks, one at a time: a prompt more at either end.
        """
        limits = self.service.scheduler.limits
        rows = OUTPUT_PRICE * limits.max_num_seqs * self.longest_output
        prompts = INPUT_PRICE * self.longest_prompt
        bound = 2 * (prompts + rows) + 2 * prompts
        in_flight = limits.max_num_seqs * (self.longest_prompt + self.longest_output)
        assert bound <= 2 * max(prompts, OUTPUT_PRICE * in_flight), "tighter than the paper's"
        return bound / min(self.tenants.values())


def make(seed: int) -> Case:
    rng = Random(seed)
    seqs = rng.choice((1, 2, 3, 5))
    prompt, output = rng.choice((2, 6, 20)), rng.choice((2, 5, 12))
    blocks = -(-(prompt + output) // 4)
    limits = SchedulerLimits(
        block_tokens=4,
        num_blocks=rng.choice((blocks, blocks * 2, blocks * seqs)),
        max_num_seqs=seqs,
        max_num_batched_tokens=seqs + rng.choice((0, 3, 12, 100)),
        max_model_len=prompt + output,
        max_waiting=10_000,
    )
    service = Service(
        Scheduler(limits, SlotTable(1, 1), frozenset({EOS})),
        rng,
        lookahead=rng.random() < 0.5,
        ends_early=rng.choice((0.0, 0.05)),
    )
    weights = [1] if rng.random() < 0.6 else [1, 2, 5]
    tenants = {name: rng.choice(weights) for name in "abcd"[: rng.choice((2, 3, 4))]}
    return Case(service, tenants, prompt, output)


def arrivals(case: Case, steps: int) -> Iterator[None]:
    """Before each step: some tenants always have enough waiting, the others come in bursts."""
    rng, service = case.service.random, case.service
    greedy = {name for name in case.tenants if rng.random() < 0.5} | {"a"}
    modes = {name: rng.randrange(3) for name in case.tenants}  # long, short or any requests
    for _ in range(steps):
        for name, weight in case.tenants.items():
            if name in greedy:
                backlog = service.queue.get(name)
                count = max(0, 3 - (backlog.waiting if backlog else 0))
            else:
                count = rng.choice((3, 8)) if rng.random() < 0.06 else 0
            for _ in range(count):
                prompt = rng.randrange(1, case.longest_prompt + 1)
                output = rng.randrange(1, case.longest_output + 1)
                if modes[name] == 0:
                    prompt, output = case.longest_prompt, case.longest_output
                elif modes[name] == 1:
                    prompt, output = 1, 1
                service.add(name, prompt, output, weight=weight)
        yield


def worst(case: Case, steps: int) -> float:
    """The largest difference over any interval in which both tenants waited throughout."""
    service = case.service
    spans: dict[tuple[str, str], tuple[float, float]] = {}
    largest = 0.0
    for _ in arrivals(case, steps):
        was = {name: service.given[name] / weight for name, weight in case.tenants.items()}
        throughout = service.step()
        now = {name: service.given[name] / weight for name, weight in case.tenants.items()}
        for pair in combinations(case.tenants, 2):
            one, other = pair
            if one in throughout and other in throughout:
                begin = was[one] - was[other]
                low, high = spans.get(pair, (begin, begin))
                here = now[one] - now[other]
                spans[pair] = low, high = min(low, here), max(high, here)
                largest = max(largest, high - low)
            else:
                spans.pop(pair, None)
    return largest


@pytest.mark.parametrize("part", range(10))
def test_two_tenants_that_wait_get_the_same_within_the_bound(part: int) -> None:
    for seed in SEEDS[part::10]:
        case = make(seed)
        assert worst(case, steps=50) <= case.bound, seed
        service = case.service
        service.scheduler.check()
        while service.scheduler.has_work or service.under_way:
            service.step()
        assert service.last.keys() == service.requests.keys(), "a request never ended"
        assert service.scheduler.stats().kv_blocks_used == 0


def test_the_bound_is_missed_when_nobody_is_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FairQueue, "charge", lambda queue, account, price: None)
    missed = 0
    for seed in SEEDS[:50]:
        case = make(seed)
        missed += worst(case, steps=300) > case.bound
    assert missed > 10


def test_the_simulation_reaches_what_it_claims_to_test() -> None:
    seen: Counter[str] = Counter()
    for seed in SEEDS[:100]:
        case = make(seed)
        difference = worst(case, steps=50)
        seen["close to the bound"] += difference > 0.4 * case.bound
        seen["preemptions"] += case.service.scheduler.stats().preemptions_total
        seen["weights"] += len(set(case.tenants.values())) > 1
        seen["ahead"] += case.service.lookahead
    for name in ("close to the bound", "preemptions", "weights", "ahead"):
        assert seen[name] >= 5, seen


def test_an_adapter_that_finds_no_room_costs_its_tenant_a_bounded_turn() -> None:
    """One slot, which one tenant's requests never leave; another tenant wants its own adapter."""
    limits = SchedulerLimits(
        block_tokens=4,
        num_blocks=100,
        max_num_seqs=4,
        max_num_batched_tokens=20,
        max_model_len=20,
        max_waiting=10_000,
    )
    scheduler = Scheduler(limits, SlotTable(1, 1), frozenset())
    service = Service(scheduler, Random(0), lookahead=True, adapters=True)
    mine, theirs = (AdapterSpec(name, "core", 1, None, 1) for name in ("mine", "theirs"))
    for _ in range(1500):
        for tenant, adapter in (("a", theirs), ("b", mine), ("c", None)):
            backlog = service.queue.get(tenant)
            if not backlog or backlog.waiting < 5:
                service.add(tenant, 4, 4, adapter=adapter)
        service.step()
    cost = INPUT_PRICE * 4 + OUTPUT_PRICE * 4
    given = sorted(service.given.values())
    assert given[-1] - given[0] <= 2 * cost * (limits.max_num_seqs + 1 + PASSES_MAX), service.given


# -- one tenant sends fifty times its share -------------------------------------------------------

STEP_US, TOKEN_US = 5000, 50


def latencies(
    clients: dict[str, int], *, steps: int, one_tenant: bool = False, flood: tuple[int, int] | None
) -> dict[str, list[tuple[int, int]]]:
    """Each client sends its next request when the last has ended; (first token, end) in us."""
    limits = SchedulerLimits(
        block_tokens=4,
        num_blocks=32 * 32,
        max_num_seqs=32,
        max_num_batched_tokens=96,
        max_model_len=120,
        max_waiting=10_000,
    )
    rng = Random(5)
    scheduler = Scheduler(limits, SlotTable(1, 1), frozenset())
    now = 0
    sent: dict[str, tuple[str, int]] = {}
    first: dict[str, int] = {}
    times: dict[str, list[tuple[int, int]]] = {name: [] for name in clients}

    def send(tenant: str) -> None:
        name = str(len(sent))
        prompt, output = rng.randrange(4, 40), rng.randrange(4, 40)
        if flood and tenant == "flood":
            prompt, output = flood
        request = Request(
            id=name,
            prompt_ids=(len(sent), *[1] * (prompt - 1)),
            sampling=SamplingParams(max_tokens=output),
            tenant="" if one_tenant else tenant,
        )
        sent[name] = tenant, now
        assert scheduler.add(request) is None

    for tenant, count in clients.items():
        for _ in range(count):
            send(tenant)
    for step in range(steps):
        plan = scheduler.plan()
        assert plan is not None
        now += STEP_US + TOKEN_US * plan.num_tokens
        tokens = {row.request_id: GO_ON for row in plan.rows if row.sample}
        for event in scheduler.commit(plan, StepResult(token_ids=tokens)):
            name = event.request_id
            first.setdefault(name, now)
            if event.finish_reason is not None:
                tenant, began = sent[name]
                if step > steps // 5:  # the beginning is not what it is like later
                    times[tenant].append((first[name] - began, now - began))
                send(tenant)
    return times


def p99(values: list[int]) -> int:
    return sorted(values)[len(values) * 99 // 100]


SHARE = {"flood": 8, "a": 8, "b": 8, "c": 8, "d": 8, "e": 4, "f": 1}


@pytest.mark.parametrize("flood", [None, (39, 39), (4, 39), (39, 4)])
def test_fifty_times_its_share_leaves_the_others_latency_within_a_third(
    flood: tuple[int, int] | None,
) -> None:
    calm = latencies(SHARE, steps=1500, flood=flood)
    flooded = latencies(SHARE | {"flood": 50 * SHARE["flood"]}, steps=1500, flood=flood)
    for index in (0, 1):
        before, after = (
            [pair[index] for name in SHARE if name != "flood" for pair in times[name]]
            for times in (calm, flooded)
        )
        assert p99(after) <= 1.3 * p99(before)
    for name in SHARE.keys() - {"flood"}:
        before, after = ([wait for wait, _ in times[name]] for times in (calm, flooded))
        assert sum(after) / len(after) <= 1.3 * sum(before) / len(before), name


def test_without_tenants_the_same_flood_does_harm() -> None:
    calm = latencies(SHARE, steps=1000, one_tenant=True, flood=None)
    flooded = latencies(
        SHARE | {"flood": 50 * SHARE["flood"]}, steps=1000, one_tenant=True, flood=None
    )
    before, after = (
        [end for name in "abcdef" for _, end in times[name]] for times in (calm, flooded)
    )
    assert p99(after) > 3 * p99(before)
