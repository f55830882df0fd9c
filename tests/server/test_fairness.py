"""The queue between tenants alone: order, counters, and what is remembered of whom."""

from dataclasses import dataclass
from random import Random

import pytest

from shoal.server.engine import fairness
from shoal.server.engine.fairness import SCALE, Account, FairQueue


@dataclass(eq=False)
class Item:
    """What waits."""

    order: int
    account: Account
    input_tokens: int = 10
    output_limit: int = 5


class Desk:
    """A queue whose items start and end when the test says so."""

    def __init__(self) -> None:
        self.queue: FairQueue[Item] = FairQueue()
        self.items: dict[int, Item] = {}

    def put(self, tenant: str, weight: int = 1) -> Item:
        item = Item(len(self.items), self.queue.open(tenant, weight))
        self.items[item.order] = item
        self.queue.put(item)
        return item

    def start(self, price: int = 0) -> Item:
        item = self.queue.peek()
        assert item is not None
        self.queue.take()
        self.queue.rewind()
        self.queue.charge(item.account, price)
        self.queue.check()
        return item

    def end(self, item: Item) -> None:
        self.queue.close(item.account)
        self.queue.check()

    def serve(self, price: int) -> str:
        item = self.start(price)
        self.end(item)
        return item.account.tenant


def test_one_tenant_is_served_in_its_order() -> None:
    desk = Desk()
    for _ in range(5):
        desk.put("")
    assert [desk.start(7).order for _ in range(5)] == [0, 1, 2, 3, 4]


def test_the_smallest_counter_is_next() -> None:
    desk = Desk()
    for tenant in "aaaabbbb":
        desk.put(tenant)
    prices = {"a": 30, "b": 10}
    served = ""
    while (item := desk.queue.peek()) is not None and len(served) < 6:
        served += desk.serve(prices[item.account.tenant])
    assert served == "abbbab"


def test_weights_divide_what_is_charged() -> None:
    desk = Desk()
    for _ in range(60):
        desk.put("a", weight=1)
        desk.put("b", weight=2)
    served = [desk.serve(6) for _ in range(60)]
    assert served.count("b") == 40


def test_what_comes_back_goes_before_the_younger_ones_of_its_tenant() -> None:
    desk = Desk()
    first = desk.put("a")
    desk.put("a")
    desk.start()
    desk.queue.put(first)
    assert desk.start() is first


def test_what_was_passed_over_is_named_again_after_rewind() -> None:
    desk = Desk()
    for tenant in "aab":
        desk.put(tenant)
    named = []
    while (item := desk.queue.peek()) is not None:
        named.append(item.order)
        desk.queue.skip(10)
    assert named == [0, 1, 2]
    desk.queue.rewind()
    desk.queue.check()
    assert desk.start().order == 0


def test_a_tenant_with_much_to_pass_over_does_not_hide_the_others() -> None:
    desk = Desk()
    for tenant in "aaaaab":
        desk.put(tenant)
    for _ in range(2):
        desk.queue.skip(2) if desk.queue.peek() else None
    item = desk.queue.peek()
    assert item is not None
    assert item.account.tenant == "b"


def test_being_idle_earns_nothing() -> None:
    desk = Desk()
    desk.put("idle")
    desk.serve(1)
    for _ in range(200):
        desk.put("busy")
    for _ in range(100):
        desk.serve(10)
    for _ in range(100):
        desk.put("idle")
    served = [desk.serve(10) for _ in range(50)]
    assert served.count("idle") == 25


def test_who_comes_when_nobody_waits_begins_where_the_last_one_is() -> None:
    desk = Desk()
    busy = desk.put("busy")
    desk.start(1000)
    newcomer = desk.put("new")
    assert newcomer.account.counter == busy.account.counter == 1000 * SCALE


def test_leaving_and_coming_back_gains_nothing() -> None:
    """A tenant that is done with each request before it sends the next keeps its counter."""
    desk = Desk()
    for _ in range(300):
        desk.put("steady")
    desk.start()
    served = {"steady": 0, "sly": 0}
    for _ in range(200):
        if not any(item.account.tenant == "sly" for item in desk.queue):
            desk.put("sly")
        served[desk.serve(10)] += 10
    assert abs(served["sly"] - served["steady"]) <= 20


def test_a_hundred_thousand_tenants_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "IDLE_MAX", 50)
    desk = Desk()
    rng = Random(0)
    desk.put("stuck")
    desk.queue.skip(1)  # whatever it has cannot start, so that nobody's counter is passed
    desk.queue.rewind()
    for index in range(20_000):
        item = Item(index + 10, desk.queue.open(f"t{index}", 1))
        desk.queue.put(item)
        desk.queue.remove(item)
        desk.queue.charge(item.account, rng.randrange(1, 100))
        desk.queue.close(item.account)
        assert desk.queue.num_accounts <= 52
        desk.queue.changes()
    desk.queue.check()
    assert len(desk.queue._turns) < 200


def test_who_is_forgotten_to_make_room_does_not_come_back_with_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fairness, "IDLE_MAX", 3)
    desk = Desk()
    for tenant in "abcdefgh":
        desk.put(tenant)
    desk.put("h")  # still waits at the end, with the smallest counter
    counters = {}
    for price in (50, 60, 70, 80, 90, 100, 110):
        item = desk.start(price)
        desk.end(item)
        counters[item.account.tenant] = item.account.counter
    assert desk.queue.num_accounts < 8
    for tenant, counter in counters.items():
        item = desk.put(tenant)
        assert item.account.counter >= counter


def test_an_endless_supply_of_new_tenants_keeps_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fairness, "IDLE_MAX", 20)
    desk = Desk()
    desk.put("old")
    desk.put("old")
    desk.put("new")
    desk.start(50)
    for index in range(500):
        desk.put(f"new{index}")  # always somebody who was never served
        if desk.serve(10) == "old":
            break
    else:
        pytest.fail("starved")


def test_random_use_is_what_a_plain_list_would_do() -> None:
    """Against the definition: the smallest counter, then who began to wait first, by order."""
    for seed in range(150):
        rng = Random(seed)
        desk = Desk()
        joined: dict[str, int] = {}
        running: list[Item] = []
        waiting: list[Item] = []
        for tick in range(80):
            action = rng.random()
            if action < 0.4:
                tenant = rng.choice("abcde")
                if all(item.account.tenant != tenant for item in waiting):
                    joined[tenant] = tick
                waiting.append(desk.put(tenant, rng.choice((1, 1, 2))))
            elif action < 0.7 and waiting:
                expected = min(
                    waiting,
                    key=lambda i: (i.account.counter, joined[i.account.tenant], i.order),
                )
                assert desk.start(rng.randrange(20)) is expected
                waiting.remove(expected)
                running.append(expected)
            elif action < 0.85 and running:
                item = running.pop(rng.randrange(len(running)))
                desk.queue.charge(item.account, rng.randrange(30))
                desk.end(item)
            elif action < 0.9 and running:
                item = running.pop(rng.randrange(len(running)))
                if all(item.account is not other.account for other in waiting):
                    joined[item.account.tenant] = tick
                desk.queue.put(item)
                waiting.append(item)
            elif waiting:
                item = waiting.pop(rng.randrange(len(waiting)))
                desk.queue.remove(item)
                desk.end(item)
            desk.queue.check()


def test_changes_tell_each_account_once_and_when_it_is_forgotten() -> None:
    desk = Desk()
    item = desk.put("a")
    (told,) = desk.queue.changes()
    assert (told.tenant, told.waiting, told.input_tokens, told.forgotten) == ("a", 1, 10, False)
    assert desk.queue.changes() == []
    desk.start(3)
    desk.end(item)
    (told,) = desk.queue.changes()
    assert (told.waiting, told.forgotten) == (0, True)
    desk.put("a")
    assert [told.forgotten for told in desk.queue.changes()] == [False]
