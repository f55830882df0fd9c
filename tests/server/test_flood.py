"""One tenant sends fifty times its share: what the others notice, and what it is told.

The real door and scheduler in simulated time; everything follows from the seed. Clients send their
next request when the last has ended, so the load is saturated with and without the flood. Pinned
adapters, copies into the bank and the prefix cache are part of it, and take time.
"""

import os
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from random import Random

import pytest

from shoal.adapters.slots import SlotTable
from shoal.adapters.spec import AdapterSpec
from shoal.server.engine.admission import Door, DoorLimits
from shoal.server.engine.plan import StepPlan, StepResult
from shoal.server.engine.request import Request, SamplingParams
from shoal.server.engine.scheduler import Scheduler, SchedulerLimits
from shoal.server.errors import Overloaded

SEEDS = range(int(os.environ.get("SHOAL_FLOOD_SEEDS", "1")))
STEP_S, TOKEN_S, LOAD_S = 0.005, 0.00005, 0.0002
GO_ON = 1
FLOOD, TIMES = "flood", 50
SHARES = {FLOOD: 8, "a": 8, "b": 8, "c": 8, "d": 8, "e": 4, "f": 1}


@dataclass(frozen=True, kw_only=True)
class Load:
    """What clients send, to what server.

    Attributes:
        shares: clients of each tenant.
        prompt, output: tokens, uniform between these.
        flood: the same of the flood's requests; None is as the others'.
        think_s: pause of a client between two requests, on average.
        adapters: different ones of a tenant, drawn for each request; the flood has ``TIMES`` more.
        units: of the adapter bank, one for each adapter.
        prefix: tokens with which every prompt of a tenant begins.
        blocks: of 4 tokens.
        waiting: requests of a tenant that may wait.
        patient: clients that were refused come back when they were told to, else at once.
    """

    shares: dict[str, int] = field(default_factory=lambda: dict(SHARES))
    prompt: tuple[int, int] = (4, 39)
    output: tuple[int, int] = (4, 39)
    flood: tuple[tuple[int, int], tuple[int, int]] | None = None
    think_s: float = 0.0
    adapters: int = 0
    units: int = 1
    prefix: int = 0
    lanes: int = 32
    blocks: int = 32 * 32
    lookahead: bool = False
    waiting: int = 10_000
    patient: bool = True

    def flooded(self) -> "Load":
        return replace(self, shares=self.shares | {FLOOD: TIMES * self.shares[FLOOD]})


LOADS = {
    "long answers": Load(flood=((4, 4), (39, 39)), lookahead=True),
    "two tenants": Load(shares={FLOOD: 24, "a": 24}, lookahead=True),
    "clients that think": Load(think_s=0.2, shares={n: 3 * k for n, k in SHARES.items()}),
    "few blocks": Load(blocks=300, lookahead=True),
    "adapters that come and go": Load(adapters=12, units=48, lookahead=True),
    "adapters in every place": Load(adapters=3, units=33),
    "a prefix for each tenant": Load(prefix=200, blocks=32 * 80, lookahead=True),
    "a prefix, few blocks": Load(prefix=200, blocks=32 * 60),
    "a short queue": Load(waiting=40, lookahead=True),
    "a short queue, hammered": Load(waiting=40, patient=False),
}


@dataclass
class Town:
    """Clients, a door, a scheduler and a device.

    Attributes:
        times: of each tenant, from sending a request to its first token, and to its end (s).
        refused, returned, in_vain: refusals by tenant; who came back when told; and was refused.
    """

    load: Load
    random: Random
    now_s: float = 100.0
    times: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    returned: int = 0
    in_vain: int = 0
    seen: Counter[str] = field(default_factory=Counter)

    def run(self, seconds: float, *, settle_s: float) -> "Town":
        load, rng = self.load, self.random
        scheduler = Scheduler(
            SchedulerLimits(
                block_tokens=4,
                num_blocks=load.blocks,
                max_num_seqs=load.lanes,
                max_num_batched_tokens=3 * load.lanes,
                max_model_len=400,
                max_waiting=100_000,
            ),
            SlotTable(load.units, 1),
            frozenset(),
        )
        door = Door(DoorLimits(max_waiting=100_000, max_waiting_per_tenant=load.waiting))
        began_s = self.now_s
        until_s = began_s + settle_s + seconds
        calls: list[tuple[float, int, str, Request | None, float]] = []
        told: dict[str, float] = {}
        serial = 0
        for tenant, count in load.shares.items():
            self.times[tenant] = []
            for _ in range(count):
                at_s = self.now_s + rng.random() * settle_s / 4
                heappush(calls, (at_s, serial := serial + 1, tenant, None, at_s))
        sent: dict[str, tuple[str, float]] = {}
        first: dict[str, float] = {}
        under_way: deque[StepPlan] = deque()
        while self.now_s < until_s:
            while calls and calls[0][0] <= self.now_s:
                _, _, tenant, again, since_s = heappop(calls)
                serial += 1
                request = again or self.request(tenant, serial)
                # What is said at the beginning is said before anything was measured.
                counts = told.pop(request.id, 0.0) > began_s + settle_s
                self.returned += counts
                try:
                    door.admit(request, self.now_s)
                except Overloaded as refusal:
                    self.refused[tenant] += 1
                    self.in_vain += counts
                    told[request.id] = self.now_s
                    after_s = refusal.retry_after_s + rng.random() * 0.1
                    at_s = self.now_s + (after_s if load.patient else 20 * STEP_S)
                    heappush(calls, (at_s, serial, tenant, request, since_s))
                else:
                    sent[request.id] = tenant, since_s
                    assert scheduler.add(request) is None
            door.take()
            scheduler.tick(self.now_s)
            while len(under_way) < 1 + load.lookahead and (plan := scheduler.plan()) is not None:
                self.seen["loads"] += len(plan.adapter_loads) + len(plan.prefetches)
                under_way.append(plan)
            if not under_way:
                self.now_s = max(self.now_s + STEP_S, calls[0][0])
                continue
            plan = under_way.popleft()
            self.now_s += STEP_S + TOKEN_S * plan.num_tokens + LOAD_S * len(plan.adapter_loads)
            self.now_s += LOAD_S * len(plan.prefetches)
            tokens = {row.request_id: GO_ON for row in plan.rows if row.sample}
            for event in scheduler.commit(plan, StepResult(token_ids=tokens)):
                name = event.request_id
                first.setdefault(name, self.now_s)
                if event.finish_reason is not None:
                    tenant, since_s = sent.pop(name)
                    self.seen["of the flood"] += tenant == FLOOD
                    # The beginning is not what it is like later.
                    if since_s > began_s + settle_s:
                        self.times[tenant].append((first[name] - since_s, self.now_s - since_s))
                    at_s = self.now_s + rng.expovariate(1) * load.think_s
                    heappush(calls, (at_s, serial := serial + 1, tenant, None, at_s))
            door.look(scheduler.backlog(), scheduler.service_total, self.now_s)
        scheduler.check()
        stats = scheduler.stats()
        self.seen["hits"] += stats.prefix_cache_hits
        self.seen["preemptions"] += stats.preemptions_total
        return self

    def request(self, tenant: str, serial: int) -> Request:
        load, rng = self.load, self.random
        prompt, output = load.prompt, load.output
        if tenant == FLOOD and load.flood is not None:
            prompt, output = load.flood
        adapter = None
        if load.adapters:
            most = load.adapters * (TIMES if tenant == FLOOD else 1)
            adapter = AdapterSpec(f"{tenant}-{rng.randrange(most)}", "core", 4, None, 1)
        start = (hash_of(tenant),) * load.prefix
        return Request(
            id=str(serial),
            prompt_ids=(*start, serial, *[1] * (rng.randint(*prompt) - 1)),
            sampling=SamplingParams(max_tokens=rng.randint(*output)),
            tenant=tenant,
            adapter=adapter,
            arrival_s=self.now_s,
        )


def hash_of(tenant: str) -> int:
    return 1_000_000 + sum(map(ord, tenant))


def p99(values: Iterable[float]) -> float:
    ordered = sorted(values)
    assert len(ordered) > 200, "too few to tell"
    return ordered[len(ordered) * 99 // 100]


def others(town: Town, index: int) -> list[float]:
    return [pair[index] for name, each in town.times.items() if name != FLOOD for pair in each]


def both(name: str, seed: int, seconds: float = 3.0) -> tuple[Town, Town]:
    load = LOADS[name]
    calm = Town(load, Random(f"{name} {seed}")).run(seconds, settle_s=1.0)
    flooded = Town(load.flooded(), Random(f"{name} {seed}")).run(seconds, settle_s=1.0)
    return calm, flooded


@pytest.mark.parametrize("name", LOADS)
def test_a_flood_leaves_the_others_p99_within_a_third(name: str) -> None:
    towns = [both(name, seed) for seed in SEEDS]
    for index, what in enumerate(("first token", "end")):
        before = p99(value for calm, _ in towns for value in others(calm, index))
        after = p99(value for _, flooded in towns for value in others(flooded, index))
        assert after <= 1.3 * before, f"{what}: {before:.3f} s, beside the flood {after:.3f} s"
    for _, flooded in towns:
        assert flooded.refused.keys() <= {FLOOD}, "who keeps to its share is never refused"
        assert flooded.seen["of the flood"] > 50, "it is served its share"


def test_what_the_flood_is_told_is_true() -> None:
    load = LOADS["a short queue"].flooded()
    town = Town(load, Random(0)).run(22.0, settle_s=10.0)
    assert town.returned > 200
    assert town.in_vain <= 0.1 * town.returned, "who comes back when told gets in"
    assert town.refused.keys() == {FLOOD}


def test_the_loads_are_what_they_say() -> None:
    def seen(name: str) -> Counter[str]:
        return both(name, 0, seconds=0.5)[1].seen

    assert seen("adapters that come and go")["loads"] > 50
    assert seen("a prefix for each tenant")["hits"] > 10_000
    assert seen("few blocks")["preemptions"] > 0
