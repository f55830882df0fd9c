"""Requests and tokens a minute, and requests at a time: bounds that hold, times that are true."""

import random
import threading
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from shoal.adapters.registry.keys import Limits
from shoal.server.errors import Overloaded
from shoal.server.http.quotas import BUSY_RETRY_MIN_S, CLOSED_RETRY_S, Grant, Quotas


class Time:
    """A clock that stands where it is put; far from zero, as a machine's is."""

    now = 86_400.0 * 30

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def quotas(time: Time) -> Quotas:
    return Quotas(time)


def refusal(quotas: Quotas, owner: str, limits: Limits) -> Overloaded:
    with pytest.raises(Overloaded) as caught:
        quotas.begin(owner, limits)
    return caught.value


@pytest.mark.parametrize("seed", range(8))
def test_no_window_holds_twice_the_requests_and_a_long_run_no_more_than_the_rate(
    quotas: Quotas, time: Time, seed: int
) -> None:
    rng = random.Random(seed)
    limits = {f"o{n}": Limits(requests_per_minute=rng.choice([1, 7, 60, 500])) for n in range(3)}
    start = time.now
    accepted: dict[str, list[float]] = {owner: [] for owner in limits}
    pause = 1.0
    for _ in range(6000):
        if rng.random() < 0.01:
            pause = rng.choice([0.001, 0.05, 1.0, 5.0, 60.0])
        time.now += rng.expovariate(1 / pause)
        owner = rng.choice(list(limits))
        try:
            quotas.begin(owner, limits[owner]).end()
            accepted[owner].append(time.now)
        except Overloaded:
            pass
        quotas.check()
    for owner, times in accepted.items():
        most = limits[owner].requests_per_minute
        assert most is not None
        for n, at in enumerate(times):
            assert bisect_right(times, at + 60.0 - 1e-6) - n <= 2 * most
        assert len(times) <= most * (1 + (time.now - start) / 60.0) + 1e-3


@pytest.mark.parametrize("seed", range(8))
def test_tokens_that_are_charged_late_are_paid_for_before_the_next_request(
    quotas: Quotas, time: Time, seed: int
) -> None:
    rng = random.Random(seed)
    most = rng.choice([10, 600, 100_000])
    limits = Limits(tokens_per_minute=most, concurrent_requests=3)
    largest = rng.choice([most // 10, most // 2, 4 * most])
    start = time.now
    total = 0
    running: list[Grant] = []
    for _ in range(4000):
        time.now += rng.expovariate(4 * most / largest / 60.0)  # four times too much
        if running and rng.random() < 0.7:
            grant = running[rng.randrange(len(running))]
            grant.charge(tokens := rng.randint(0, largest))
            total += tokens
        if running and rng.random() < 0.5:
            running.pop(rng.randrange(len(running))).end()
        with suppress(Overloaded):
            running.append(quotas.begin("ann", limits))
        if total > most * (1 + (time.now - start) / 60.0):
            refused = refusal(quotas, "ann", limits)
            assert f"{most} tokens a minute" in str(refused) or len(running) == 3
        quotas.check()
    for grant in running:
        grant.end()
    minutes = (time.now - start) / 60.0
    assert total >= 0.5 * most * minutes, "it was asked for, so it was given"
    debt = total - most * (1 + minutes)
    if debt > 0:
        assert refusal(quotas, "ann", limits).retry_after_s >= debt * 60.0 / most


@pytest.mark.parametrize("seed", range(20))
def test_trying_again_when_told_succeeds_and_before_that_does_not(
    quotas: Quotas, time: Time, seed: int
) -> None:
    rng = random.Random(seed)
    limits = Limits(
        requests_per_minute=rng.choice([None, 1, 30, 1000]),
        tokens_per_minute=rng.choice([1, 999, 10**6]),
    )
    tokens = limits.tokens_per_minute or 1
    refusals = 0
    for _ in range(300):
        time.now += rng.choice([0.0, 0.0, 0.01, 3.0, 70.0])
        try:
            with quotas.begin("ann", limits) as grant:
                grant.charge(rng.randint(0, 2) * rng.randint(0, tokens))
        except Overloaded as error:
            wait_s = error.retry_after_s
            if wait_s < 1e-3:
                continue  # 1% of it is within what clocks round
            refusals += 1
            refused_at = time.now
            time.now = refused_at + 0.99 * wait_s
            again = refusal(quotas, "ann", limits)
            assert again.retry_after_s == pytest.approx(0.01 * wait_s, rel=1e-3, abs=1e-6)
            time.now = refused_at + wait_s
            quotas.begin("ann", limits).end()
    assert refusals > 10


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_left_of_whoever_came_and_went(quotas: Quotas, time: Time, seed: int) -> None:
    rng = random.Random(seed)
    kinds = [None, 0, 1, 5, 1000]
    grants: list[Grant] = []
    ended: list[Grant] = []
    waits: list[float] = []
    for _ in range(3000):
        action = rng.random()
        if action < 0.4:
            limits = Limits(rng.choice(kinds), rng.choice(kinds), rng.choice(kinds))
            try:
                grants.append(quotas.begin(f"o{rng.randrange(40)}", limits))
            except Overloaded as error:
                waits.append(error.retry_after_s)
        elif action < 0.6 and grants:
            rng.choice(grants + ended[-5:]).charge(rng.randrange(50))
        elif action < 0.9 and grants:
            grant = grants.pop(rng.randrange(len(grants)))
            grant.end()
            ended.append(grant)
        elif ended:
            rng.choice(ended).end()  # again
        time.now += rng.choice([0.0, 0.1, 10.0])
        quotas.check()
        assert len(quotas) <= 40
    assert min(waits) > 0.0
    for grant in grants:
        grant.end()
    time.now += 60.0 * 10**6
    assert len(quotas) == 0
    assert quotas._idle == []
    for grant in grants + ended:
        grant.charge(100)
        grant.end()
    assert len(quotas) == 0, "whatever still has a grant in its hands"


def test_a_million_owners_that_went_cost_no_memory(quotas: Quotas, time: Time) -> None:
    most = 0
    for number in range(20_000):
        quotas.begin(f"owner{number}", Limits(requests_per_minute=60)).end()
        time.now += 0.01
        most = max(most, len(quotas))
    assert most <= 101, "one request is out for a second"


@pytest.mark.parametrize("seed", range(5))
def test_a_clock_that_jumps_back_neither_gives_nor_takes(
    quotas: Quotas, time: Time, seed: int
) -> None:
    rng = random.Random(seed)
    limits = Limits(requests_per_minute=60)
    accepted, forward, longest = 0, 0.0, 0.0
    for _ in range(3000):
        step = rng.expovariate(3.0)
        time.now += step
        forward += step
        if rng.random() < 0.05:
            time.now -= rng.choice([0.5, 100.0, 10**6])
        try:
            quotas.begin("ann", limits).end()
            accepted += 1
        except Overloaded as error:
            longest = max(longest, error.retry_after_s)
        quotas.check()
    assert longest <= 1.0 + 1e-6
    assert 60 + forward - 200 < accepted <= 60 + forward + 1e-3


def test_requests_at_a_time_are_counted_until_they_end(quotas: Quotas, time: Time) -> None:
    limits = Limits(concurrent_requests=3)
    grants = [quotas.begin("ann", limits) for _ in range(3)]
    refused = refusal(quotas, "ann", limits)
    assert str(refused).startswith("this key's limit is 3 requests at a time; try again in ")
    assert refused.retry_after_s >= BUSY_RETRY_MIN_S
    quotas.begin("bob", limits).end()
    grants[1].end()
    grants[1].end()
    with quotas.begin("ann", limits):
        refusal(quotas, "ann", limits)
    quotas.begin("ann", limits)
    refusal(quotas, "ann", limits)


def test_the_time_until_one_ends_is_estimated_from_those_that_did(
    quotas: Quotas, time: Time
) -> None:
    """Four at a time that take 8 s each, two seconds apart: one ends every two seconds."""
    limits = Limits(concurrent_requests=4)
    running: list[Grant] = []
    for step in range(100):
        if step >= 4:
            error = refusal(quotas, "ann", limits)
            if step > 4:
                assert error.retry_after_s == pytest.approx(2.0)
            running.pop(0).end()
        running.append(quotas.begin("ann", limits))
        time.now += 2.0
    # One that was lowered has to wait for more of them to end.
    assert refusal(quotas, "ann", Limits(concurrent_requests=3)).retry_after_s == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("limits", "what"),
    [
        (Limits(requests_per_minute=0), "0 requests a minute"),
        (Limits(tokens_per_minute=0), "0 tokens a minute"),
        (Limits(concurrent_requests=0), "0 requests at a time"),
    ],
)
def test_a_limit_of_zero_refuses_always(
    quotas: Quotas, time: Time, limits: Limits, what: str
) -> None:
    for _ in range(3):
        error = refusal(quotas, "ann", limits)
        assert what in str(error)
        assert error.retry_after_s == CLOSED_RETRY_S
        time.now += CLOSED_RETRY_S
    assert len(quotas) == 0


def test_the_message_names_the_limit_that_takes_longest(quotas: Quotas) -> None:
    limits = Limits(requests_per_minute=1, tokens_per_minute=60)
    with quotas.begin("ann", limits) as grant:
        grant.charge(10)
    error = refusal(quotas, "ann", limits)
    assert str(error) == "this key's limit is 1 requests a minute; try again in 60 s"
    with quotas.begin("bob", limits) as grant:
        grant.charge(200)
    error = refusal(quotas, "bob", limits)
    assert str(error) == "this key's limit is 60 tokens a minute; try again in 141 s"


def test_a_key_without_limits_neither_counts_nor_forgives(quotas: Quotas) -> None:
    limits, free = Limits(requests_per_minute=1, tokens_per_minute=60), Limits()
    with quotas.begin("ann", free) as grant:
        grant.charge(10**9)
    with quotas.begin("ann", limits) as grant:
        grant.charge(60)
    before = refusal(quotas, "ann", limits).retry_after_s
    with quotas.begin("ann", free) as grant:
        grant.charge(10**9)
    assert refusal(quotas, "ann", limits).retry_after_s == before
    quotas.check()


def test_limits_that_change_hold_at_once(quotas: Quotas, time: Time) -> None:
    for _ in range(60):
        quotas.begin("ann", Limits(requests_per_minute=60)).end()
    quotas.begin("ann", Limits(requests_per_minute=120)).end()
    assert refusal(quotas, "ann", Limits(requests_per_minute=10)).retry_after_s == pytest.approx(
        52 * 6.0
    )


def test_threads_never_get_more_at_a_time_than_the_limit(quotas: Quotas) -> None:
    limits = Limits(concurrent_requests=3, tokens_per_minute=10**9)
    running, most, lock = 0, 0, threading.Lock()

    def work() -> int:
        nonlocal running, most
        done = 0
        for _ in range(500):
            try:
                with quotas.begin("ann", limits) as grant:
                    with lock:
                        running += 1
                        most = max(most, running)
                    grant.charge(1)
                    with lock:
                        running -= 1
                    done += 1
            except Overloaded:
                pass
        return done

    with ThreadPoolExecutor(8) as pool:
        total = sum(future.result(60.0) for future in [pool.submit(work) for _ in range(8)])
    assert most <= 3
    account = quotas._owners["ann"]
    assert account.tokens is not None
    assert account.tokens.out <= total
    assert not account.started
    quotas.check()


def test_a_grant_that_has_ended_cannot_be_charged(quotas: Quotas) -> None:
    limits = Limits(tokens_per_minute=60)
    other = quotas.begin("ann", limits)
    with quotas.begin("ann", limits) as grant:
        grant.charge(60)
    grant.charge(10**9)
    assert refusal(quotas, "ann", limits).retry_after_s == pytest.approx(1.0)
    other.end()


@pytest.mark.parametrize("rate", [{"requests_per_minute": 600}, {"tokens_per_minute": 600}])
def test_a_key_with_a_low_limit_does_not_slow_the_others(
    quotas: Quotas, time: Time, rate: dict[str, int]
) -> None:
    high, low = Limits(**rate), Limits(**dict.fromkeys(rate, 6))
    accepted = {high: 0, low: 0}
    for _ in range(6000):
        time.now += 0.1
        for limits in (low, high, low):
            with suppress(Overloaded), quotas.begin("ann", limits) as grant:
                grant.charge(1)
                accepted[limits] += 1
        quotas.check()
    assert sum(accepted.values()) <= 600 * 11
    assert accepted[high] >= 600 * 10 - 6 * 11
    assert accepted[low] <= 6 * 11


def test_what_one_key_took_is_owed_by_the_others_but_not_for_ever(
    quotas: Quotas, time: Time
) -> None:
    high, low = Limits(requests_per_minute=600), Limits(requests_per_minute=6)
    for _ in range(600):
        quotas.begin("ann", high).end()
    assert refusal(quotas, "ann", low).retry_after_s == pytest.approx((601 - 6) * 10.0)
    for _ in range(10_000):
        time.now += 0.1
        quotas.begin("ann", high).end()
    assert refusal(quotas, "ann", low).retry_after_s <= (601 - 6) * 10.0
    for limit in range(1000, 2000):  # limits that were changed again and again leave nothing
        time.now += 86_400.0
        quotas.begin("ann", Limits(requests_per_minute=limit)).end()
    assert len(quotas._owners["ann"].requests._by_limit) <= 2


def test_what_is_taken_back_was_never_taken(quotas: Quotas, time: Time) -> None:
    limits = Limits(requests_per_minute=2, tokens_per_minute=60, concurrent_requests=1)
    quotas.begin("ann", limits).end()
    for _ in range(5):
        grant = quotas.begin("ann", limits)
        grant.charge(500)
        grant.take_back()
        grant.take_back()
        grant.end()
        quotas.check()
    quotas.begin("ann", limits).end()
    assert refusal(quotas, "ann", limits).retry_after_s == pytest.approx(30.0)
