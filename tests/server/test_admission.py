"""The door: what it refuses, and whether what it says about coming back is true."""

from dataclasses import dataclass, field
from heapq import heappop, heappush
from random import Random

import pytest

from shoal.adapters.slots import SlotTable
from shoal.server.engine.admission import Door, DoorLimits
from shoal.server.engine.fairness import SCALE, Backlog
from shoal.server.engine.plan import StepResult
from shoal.server.engine.request import Request, SamplingParams
from shoal.server.engine.scheduler import Scheduler, SchedulerLimits
from shoal.server.errors import Overloaded

STEP_S, TOKEN_S = 0.02, 0.0002


@dataclass
class Town:
    """Clients, a door, a scheduler and a device, in simulated time.

    A client sends a request, waits for its end, thinks, and sends the next. Refused, it comes back
    when it was told to, and a little later for the network.
    """

    door: Door
    random: Random
    think_s: float
    first_s: float = 5.0
    counts_from_s: float = 110.0  # the rate is known by then, and first refusals are over
    rounds: int = 1_000_000
    now_s: float = 100.0
    accepted: int = 0
    refused: int = 0
    retried: int = 0
    in_vain: int = 0
    said: list[int] = field(default_factory=list)
    idle_steps: int = 0

    def run(self, tenants: dict[str, int], seconds: float) -> None:
        rng = self.random
        limits = SchedulerLimits(
            block_tokens=4,
            num_blocks=2000,
            max_num_seqs=16,
            max_num_batched_tokens=128,
            max_model_len=200,
            max_waiting=10_000,
        )
        scheduler = Scheduler(limits, SlotTable(1, 1), frozenset())
        calls: list[tuple[float, int, str, Request | None, int]] = []
        serial = 0
        for tenant, count in tenants.items():
            for _ in range(count):
                at_s = self.now_s + rng.random() * self.first_s
                heappush(calls, (at_s, serial := serial + 1, tenant, None, self.rounds))
        told: dict[str, float] = {}
        left: dict[str, tuple[str, int]] = {}
        until_s = self.now_s + seconds
        while self.now_s < until_s and (calls or scheduler.has_work):
            while calls and calls[0][0] <= self.now_s:
                _, _, tenant, again, rounds = heappop(calls)
                serial += 1
                request = again or Request(
                    id=str(serial),
                    prompt_ids=(serial, *[1] * rng.randrange(4, 60)),
                    sampling=SamplingParams(max_tokens=rng.randrange(4, 100)),
                    tenant=tenant,
                )
                counts = again is not None and told.pop(again.id) >= self.counts_from_s
                self.retried += counts
                try:
                    self.door.admit(request, self.now_s)
                except Overloaded as refusal:
                    self.refused += 1
                    self.in_vain += counts
                    after_s = refusal.retry_after_s
                    assert after_s == int(after_s) >= 1
                    self.said.append(int(after_s))
                    told[request.id] = self.now_s
                    at_s = self.now_s + after_s + rng.random() * 0.2
                    heappush(calls, (at_s, serial, tenant, request, rounds))
                else:
                    self.accepted += 1
                    left[request.id] = tenant, rounds - 1
                    assert scheduler.add(request) is None
            self.door.take()
            scheduler.tick(self.now_s)
            plan = scheduler.plan()
            if plan is None:
                self.now_s += STEP_S
                self.idle_steps += 1
            else:
                self.now_s += STEP_S + TOKEN_S * plan.num_tokens
                tokens = {row.request_id: 1 for row in plan.rows if row.sample}
                for event in scheduler.commit(plan, StepResult(token_ids=tokens)):
                    if event.finish_reason is not None:
                        tenant, rounds = left.pop(event.request_id)
                        if rounds:
                            at_s = self.now_s + rng.expovariate(1) * self.think_s
                            heappush(calls, (at_s, serial := serial + 1, tenant, None, rounds))
            self.door.look(scheduler.backlog(), scheduler.service_total, self.now_s)
            assert self.door.num_waiting == scheduler.num_waiting <= self.door.limits.max_waiting


def make_door(waiting: int = 1000, tenant: int = 1000, wait_s: float | None = None) -> Door:
    return Door(DoorLimits(max_waiting=waiting, max_waiting_per_tenant=tenant, max_wait_s=wait_s))


CROWDS: dict[str, tuple[dict[str, int], dict[str, float]]] = {
    "one tenant, too many clients": ({"a": 80}, {"tenant": 20}),
    "a flood beside others": ({"a": 150, "b": 4, "c": 4}, {"tenant": 30}),
    "several floods": (dict.fromkeys("abcdef", 40), {"tenant": 10}),
    "the whole queue": (dict.fromkeys("abcdefghij", 12), {"waiting": 40}),
    "too long a wait": ({"a": 80, "b": 40}, {"wait_s": 5.0}),
}


@pytest.mark.parametrize("think_s", [0.0, 2.0])
@pytest.mark.parametrize("crowd", CROWDS)
def test_who_comes_back_when_told_gets_in(crowd: str, think_s: float) -> None:
    tenants, limits = CROWDS[crowd]
    town = Town(make_door(**limits), Random(crowd), think_s)  # type: ignore[arg-type]
    town.run(tenants, seconds=60)
    assert town.retried > 100
    assert town.in_vain <= 0.1 * town.retried
    assert town.idle_steps <= 5, "places were kept that nobody came for"


def test_a_crowd_that_comes_once_gets_through() -> None:
    town = Town(make_door(tenant=20), Random(1), think_s=0.0, rounds=1)
    town.run({"a": 200, "b": 30}, seconds=500)
    assert town.accepted == 230


def test_a_flood_takes_no_place_of_the_others() -> None:
    door = make_door(waiting=100, tenant=30)
    for _ in range(30):
        door.admit(ask("a"), 0.0)
    with pytest.raises(Overloaded, match="30 of your requests wait, and 30 may"):
        door.admit(ask("a"), 0.0)
    for _ in range(30):
        door.admit(ask("b"), 0.0)
    assert door.num_waiting == 60


def test_a_full_queue_refuses_anybody() -> None:
    door = make_door(waiting=2)
    door.admit(ask("a"), 0.0)
    door.admit(ask("b"), 0.0)
    with pytest.raises(Overloaded, match="2 requests wait, and 2 may"):
        door.admit(ask("c"), 0.0)
    assert door.num_waiting == 2


def test_asking_again_too_early_is_told_the_same_moment() -> None:
    door = make_door(tenant=1)
    door.admit(ask("a", 1), 0.0)
    refused = ask("a", 2)
    times = []
    for now_s in (0.0, 0.25, 0.5, 0.75):
        with pytest.raises(Overloaded) as refusal:
            door.admit(refused, now_s)
        times.append(refusal.value.retry_after_s)
    assert times == [1.0] * 4  # whole seconds, never less than is left


def backlog(tenant: str, waiting: int, counter: int = 0) -> Backlog:
    return Backlog(tenant, counter * SCALE, 1, waiting, waiting * 10, waiting * 45, None, False)


def test_the_time_is_what_waits_ahead_over_the_rate() -> None:
    """Requests cost 100; 50 are served in a second; of two tenants each gets half of that."""
    door = make_door(tenant=20)
    for second in range(30):
        counters = second * 25
        door.look(
            [backlog("a", 20, counters), backlog("b", 20, counters)], second * 50, float(second)
        )
    with pytest.raises(Overloaded) as refusal:
        door.admit(ask("a"), 29.0)
    # Places fall free every 4 s; nine times in ten the first does within 4 * (1 + 1.3 * 2).
    assert refusal.value.retry_after_s == 15
    with pytest.raises(Overloaded) as refusal:
        door.admit(ask("a", 2), 29.0)
    assert refusal.value.retry_after_s > 15


def test_a_tenant_that_was_served_less_waits_less() -> None:
    def said(counter_of_b: int) -> float:
        door = make_door(tenant=10)
        for second in range(30):
            changes = [backlog("a", 10, 1000), backlog("b", 10, counter_of_b)]
            door.look(changes, second * 50, float(second))
        with pytest.raises(Overloaded) as refusal:
            door.admit(ask("a"), 29.0)
        return refusal.value.retry_after_s

    assert said(counter_of_b=900) > said(counter_of_b=1100) > said(counter_of_b=9999)


def test_a_wait_beyond_the_limit_is_refused_before_it_begins() -> None:
    door = make_door(wait_s=10.0)
    for second in range(30):
        door.look([backlog("a", 4, second * 50)], second * 50, float(second))
    door.admit(ask("a", 1), 29.0)  # four ahead, two seconds each
    door.admit(ask("a", 2), 29.0)
    with pytest.raises(Overloaded, match=r"would wait for 12\.0 s, and the limit is 10 s"):
        door.admit(ask("a", 3), 29.0)


def test_the_wait_counts_others_that_were_served_less() -> None:
    door = make_door(wait_s=10.0)
    for second in range(30):
        changes = [backlog("ahead", 0, 1000), backlog("behind", 4, 400)]
        door.look(changes, second * 50, float(second))
    door.admit(ask("new"), 29.0)
    with pytest.raises(Overloaded, match=r"would wait for 12\.0 s"):
        door.admit(ask("ahead"), 29.0)  # 600 are due to the other first


def test_a_clock_that_goes_back_is_harmless() -> None:
    door = make_door(tenant=1)
    door.admit(ask("a", 1), 5000.0)
    with pytest.raises(Overloaded):
        door.admit(ask("a", 2), 5000.0)
    door.look([backlog("a", 1)], 100, 5000.0)
    for now_s in (10.0, 10.5, 12.0):
        door.take()
        door.look([backlog("a", 1)], 200, now_s)
        with pytest.raises(Overloaded) as refusal:
            door.admit(ask("a", 2), now_s)
        assert 1 <= refusal.value.retry_after_s <= 10
    door.look([backlog("a", 0)], 300, 13.0)
    door.admit(ask("a", 3), 20.0)  # nobody came for the promised place


def ask(tenant: str, number: int = 0) -> Request:
    return Request(
        id="x",
        prompt_ids=(number,) * 10,
        sampling=SamplingParams(max_tokens=45),
        tenant=tenant,
    )


@pytest.mark.parametrize("of_one", [50, 100])
def test_a_tenant_that_never_comes_back_does_not_keep_the_places_from_another(of_one: int) -> None:
    door = Door(DoorLimits(max_waiting=100, max_waiting_per_tenant=of_one))
    sampling = SamplingParams(max_tokens=16)
    now_s, number, served = 0.0, 0, 0
    waiting = {"flood": 0, "other": 0}
    counters = {"flood": 0, "other": 0}

    def ask(tenant: str) -> bool:
        nonlocal number
        number += 1  # always something else, so that no promise is ever claimed
        request = Request(
            id=str(number), prompt_ids=(number, 1, 2), sampling=sampling, tenant=tenant
        )
        try:
            door.admit(request, now_s)
        except Overloaded:
            return False
        waiting[tenant] += 1
        return True

    accepted = []
    for step in range(500):
        now_s += 0.1
        door.take()
        if any(waiting.values()):  # ten requests a second, of whom was served less
            tenant = min((t for t in waiting if waiting[t]), key=lambda t: counters[t])
            waiting[tenant] -= 1
            served += 35
            counters[tenant] += 35 * SCALE
        changes = [
            Backlog(t, counters[t], 1, waiting[t], 3 * waiting[t], 16 * waiting[t], 16.0, False)
            for t in waiting
        ]
        door.look(changes, served, now_s)
        if step < 300:
            for _ in range(6):
                ask("flood")
        if step % 10 == 0:
            accepted.append(ask("other"))
    assert sum(accepted) >= 0.9 * len(accepted)
    assert all(accepted[-15:]), "nobody waits any more"
