"""The engine's thread. Steps are held and released by the tests; nothing here sleeps.

What holds for any runner is tested with one that finishes a step in ``submit`` and with one that
looks ahead, whose steps block in ``wait``.
"""

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from shoal.adapters.slots import SlotTable
from shoal.adapters.spec import AdapterSpec
from shoal.server.engine.loop import EngineLoop
from shoal.server.engine.plan import DeviceLost, Pending, StepPlan
from shoal.server.engine.request import FinishReason, Request, SamplingParams, TokenEvent
from shoal.server.engine.scheduler import Scheduler, SchedulerLimits
from shoal.server.errors import (
    DeadlineExceeded,
    Draining,
    EngineFailure,
    Overloaded,
    PromptTooLong,
)
from shoal.server.model.fake import FakeRunner

WAIT_S = 20.0  # far above anything a passing test needs


@dataclass
class Bench:
    """A loop over a fake runner, and what it delivered."""

    max_waiting: int = 100
    max_waiting_per_tenant: int | None = None
    now_s: float = 100.0
    lookahead: bool = False
    eos: int | None = None
    held: bool = False
    batches: queue.Queue[list[TokenEvent]] = field(default_factory=queue.Queue)
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    go_on: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    fault: BaseException | None = None
    submit_faults: list[Exception | None] = field(default_factory=list)  # of the next submits
    deliver_fault: Exception | None = None
    clock_s: float = 100.0
    pins: list[str] = field(default_factory=list)
    idle: Callable[[], bool] | None = None

    def __post_init__(self) -> None:
        limits = SchedulerLimits(
            block_tokens=4,
            num_blocks=64,
            max_num_seqs=4,
            max_num_batched_tokens=64,
            max_model_len=200,
            max_waiting=self.max_waiting,
            max_waiting_per_tenant=self.max_waiting_per_tenant,
        )
        eos = frozenset() if self.eos is None else frozenset({self.eos})
        scheduler = Scheduler(limits, SlotTable(2, 10), eos)
        self.runner = Submitting(self)
        self.loop = EngineLoop(
            scheduler,
            self.runner,
            self._deliver,
            staged=self,
            clock=lambda: self.now_s,
            idle=self.idle,
        )
        self._ends: dict[str, TokenEvent] = {}

    def before_step(self, plan: StepPlan) -> None:
        self.clock_s += 1.0
        self.entered.release()
        if self.held:
            assert self.go_on.acquire(timeout=WAIT_S)
        fault, self.fault = self.fault, None
        if fault is not None:
            raise fault

    def _deliver(self, events: list[TokenEvent]) -> None:
        self.batches.put(events)
        fault, self.deliver_fault = self.deliver_fault, None
        if fault is not None:
            raise fault

    def pin(self, digest: str) -> bool:
        self.pins.append(digest)
        return True

    def unpin(self, digest: str) -> None:
        self.pins.remove(digest)

    def wait_for_step(self) -> None:
        assert self.entered.acquire(timeout=WAIT_S)

    def last(self, name: str) -> TokenEvent:
        """The last event of one request; those of others are kept for their turn."""
        while name not in self._ends:
            for event in self.batches.get(timeout=WAIT_S):
                if event.finish_reason or event.error:
                    self._ends[event.request_id] = event
        return self._ends[name]

    def until_end(self, name: str) -> list[TokenEvent]:
        """Events of one request up to its last."""
        events: list[TokenEvent] = []
        while True:
            events += [e for e in self.batches.get(timeout=WAIT_S) if e.request_id == name]
            if events and (events[-1].finish_reason or events[-1].error):
                return events


class Submitting(FakeRunner):
    """Notes each plan it is given, and refuses those it is told to."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(1000, 4, lookahead=bench.lookahead, before_step=bench.before_step)
        self._bench = bench
        self.submitted: list[list[str]] = []

    def submit(self, plan: StepPlan) -> Pending:
        self.submitted.append([row.request_id for row in plan.rows])
        faults = self._bench.submit_faults
        if faults and (fault := faults.pop(0)) is not None:
            raise fault
        return super().submit(plan)


@pytest.fixture(params=[False, True], ids=["in turn", "ahead"])
def lookahead(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@contextmanager
def running(**options: Any) -> Iterator[Bench]:
    bench = Bench(**options)
    bench.loop.start()
    try:
        yield bench
    finally:
        bench.held = False
        bench.go_on.release(1000)
        bench.loop.stop()


def request(name: str, max_tokens: int = 3, prompt: tuple[int, ...] = (1, 2, 3)) -> Request:
    return Request(id=name, prompt_ids=prompt, sampling=SamplingParams(max_tokens=max_tokens))


def tokens(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def test_a_request_is_served(lookahead: bool) -> None:
    with running(lookahead=lookahead) as bench:
        bench.loop.submit(request("a"))
        events = bench.until_end("a")
    assert tokens(events) == bench.runner.expected((1, 2, 3), None, 3)
    assert events[-1].finish_reason is FinishReason.LENGTH


def test_one_delivery_carries_all_of_a_step(lookahead: bool) -> None:
    bench = Bench(lookahead=lookahead)
    for name in "abc":
        bench.loop.submit(request(name))
    bench.loop.start()
    first = bench.batches.get(timeout=WAIT_S)
    bench.loop.stop()
    assert [event.request_id for event in first] == ["a", "b", "c"]


def test_an_idle_loop_runs_no_steps_and_wakes_for_work(lookahead: bool) -> None:
    with running(lookahead=lookahead) as bench:
        for name in ("a", "b"):
            bench.loop.submit(request(name, max_tokens=2))
            bench.until_end(name)
        assert bench.loop.stats().steps_total == 4


def test_idle_moments_are_used_and_end_when_work_comes() -> None:
    pieces: list[int] = []
    working = threading.Event()
    bench = Bench(held=True)

    def idle() -> bool:
        assert not bench.loop.stats().running
        pieces.append(bench.runner.steps)
        if len(pieces) == 3:
            bench.loop.submit(request("a"))  # as from another thread, in the middle of a piece
            working.set()
        return len(pieces) < 100

    bench.loop._idle = idle
    bench.loop.start()
    try:
        assert working.wait(WAIT_S)
        bench.wait_for_step()
        assert len(pieces) == 3, "a request waits for one piece at the most"
        bench.held = False
        bench.go_on.release(100)
        bench.until_end("a")
        assert bench.loop.drain(WAIT_S)
    finally:
        bench.go_on.release(1000)
        bench.loop.stop()
    assert set(pieces[3:]) <= {bench.runner.steps}, "none while steps were under way"


def test_a_failure_in_an_idle_moment_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []

    def idle() -> bool:
        calls.append(1)
        raise RuntimeError("planted")

    with caplog.at_level(logging.CRITICAL + 1), running(idle=idle) as bench:
        for name in ("a", "b"):
            bench.loop.submit(request(name))
            assert bench.until_end(name)[-1].finish_reason is FinishReason.LENGTH
    assert len(calls) == 1


def test_an_abort_takes_effect_before_the_next_step() -> None:
    with running() as bench:
        bench.held = True
        bench.loop.submit(request("a", max_tokens=100))
        bench.wait_for_step()
        bench.loop.abort("a")
        bench.go_on.release()
        events = bench.until_end("a")
        assert events[-1].finish_reason is FinishReason.ABORT
        assert len(tokens(events)) == 1
        assert bench.loop.stats().kv_blocks_used == 0
        assert bench.runner.steps == 1


def test_an_adapter_stays_staged_until_the_engine_is_done_with_it(lookahead: bool) -> None:
    adapter = AdapterSpec("d", "core", 1, "basis", 10)
    with running(lookahead=lookahead) as bench:
        bench.held = True
        bench.loop.submit(replace(request("a", max_tokens=100), adapter=adapter))
        bench.wait_for_step()
        bench.loop.abort("a")
        # The client has left, but the step under way may still ask for the adapter.
        assert bench.pins == ["d"]
        bench.go_on.release(2)
        bench.until_end("a")
        assert bench.loop.drain(WAIT_S)
        assert bench.pins == []


def test_aborting_what_was_never_submitted_or_has_ended_does_nothing(lookahead: bool) -> None:
    with running(lookahead=lookahead) as bench:
        bench.loop.abort("ghost")
        bench.loop.submit(request("a"))
        bench.until_end("a")
        bench.loop.abort("a")
        bench.loop.submit(request("b"))
        assert bench.until_end("b")[-1].finish_reason is FinishReason.LENGTH


def test_submit_and_abort_in_one_inbox_end_once(lookahead: bool) -> None:
    bench = Bench(lookahead=lookahead)
    bench.loop.submit(request("a"))
    bench.loop.abort("a")
    bench.loop.start()
    events = bench.until_end("a")
    bench.loop.stop()
    assert [event.finish_reason for event in events] == [FinishReason.ABORT]


def test_a_failed_step_fails_its_requests_and_the_engine_goes_on(
    lookahead: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with running(lookahead=lookahead) as bench, caplog.at_level(logging.CRITICAL + 1):
        bench.fault = RuntimeError("planted")
        bench.loop.submit(request("a"))
        (event,) = bench.until_end("a")
        assert isinstance(event.error, EngineFailure)
        assert "planted" not in str(event.error)
        assert bench.loop.stats().kv_blocks_used == 0
        bench.loop.submit(request("b"))
        assert tokens(bench.until_end("b")) == bench.runner.expected((1, 2, 3), None, 3)


def test_a_consumer_that_raises_harms_nobody(
    lookahead: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with running(lookahead=lookahead) as bench:
        bench.deliver_fault = RuntimeError("planted")
        bench.loop.submit(request("a"))
        assert len(tokens(bench.until_end("a"))) == 3
    assert "deliver_failed" in caplog.text


def test_a_thread_that_dies_leaves_no_request_hanging(
    lookahead: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with running(lookahead=lookahead) as bench:
        bench.fault = SystemExit()
        bench.loop.submit(request("a"))
        (event,) = bench.until_end("a")
        assert isinstance(event.error, EngineFailure)
        assert bench.loop.drain(WAIT_S)
        assert not bench.loop.alive
        with pytest.raises(Draining):
            bench.loop.submit(request("b"))
    assert "no further request is served" in caplog.text


@pytest.mark.parametrize("submitting", [False, True])
def test_a_lost_device_ends_the_engine_and_every_request_once(
    lookahead: bool, submitting: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with running(lookahead=lookahead, held=True) as bench:
        bench.loop.submit(request("a", max_tokens=50))
        bench.wait_for_step()
        bench.loop.submit(request("b"))
        if submitting:
            bench.submit_faults = [None, DeviceLost("planted")]
        else:
            bench.fault = DeviceLost("planted")
        bench.held = False
        bench.go_on.release()
        assert bench.loop.drain(WAIT_S)
        assert not bench.loop.alive
        with pytest.raises(Draining):
            bench.loop.submit(request("c"))
    events = [event for batch in list(bench.batches.queue) for event in batch]
    last = [e.request_id for e in events if e.error is not None or e.finish_reason is not None]
    assert sorted(last) == ["a", "b"]
    assert all(isinstance(e.error, EngineFailure) for e in events if e.error is not None)
    assert "no further request is served" in caplog.text


def test_a_request_that_can_never_run_ends_with_its_error(lookahead: bool) -> None:
    with running(lookahead=lookahead) as bench:
        bench.loop.submit(request("a", prompt=(1,) * 200))
        (event,) = bench.until_end("a")
    assert isinstance(event.error, PromptTooLong)


def test_a_full_queue_refuses_and_changes_nothing(lookahead: bool) -> None:
    bench = Bench(lookahead=lookahead, max_waiting=2)
    bench.loop.submit(request("a"))
    bench.loop.submit(request("b"))
    with pytest.raises(Overloaded) as refusal:
        bench.loop.submit(request("c"))
    assert refusal.value.retry_after_s > 0
    assert bench.loop.stats().waiting == 2
    bench.loop.start()
    bench.until_end("b")
    bench.loop.submit(request("c"))
    bench.until_end("c")
    bench.loop.stop()


def test_requests_taken_in_count_as_waiting_until_they_run(lookahead: bool) -> None:
    with running(lookahead=lookahead, max_waiting=1) as bench:
        bench.held = True
        bench.loop.submit(request("a"))
        bench.wait_for_step()  # taken in, its first step not over
        with pytest.raises(Overloaded):
            bench.loop.submit(request("b"))


def test_a_tenant_with_a_full_queue_leaves_the_others_theirs(lookahead: bool) -> None:
    bench = Bench(lookahead=lookahead, max_waiting=4, max_waiting_per_tenant=2)
    for name in ("a", "b"):
        bench.loop.submit(replace(request(name), tenant="x"))
    with pytest.raises(Overloaded):
        bench.loop.submit(replace(request("c"), tenant="x"))
    bench.loop.submit(replace(request("d"), tenant="y"))
    bench.loop.start()
    bench.until_end("d")
    assert bench.loop.drain(WAIT_S)
    bench.loop.stop()


def test_a_deadline_ends_what_waits_and_what_runs(lookahead: bool) -> None:
    with running(lookahead=lookahead, held=True) as bench:
        for name in "abcd":
            bench.loop.submit(replace(request(name, max_tokens=100), deadline_s=200.0))
        bench.wait_for_step()
        bench.loop.submit(replace(request("e"), arrival_s=150.0, deadline_s=200.0))
        bench.now_s = 200.0
        bench.held = False
        bench.go_on.release(2)
        for name in "abcd":
            assert bench.last(name).finish_reason is FinishReason.DEADLINE
        assert isinstance(bench.last("e").error, DeadlineExceeded)
        assert bench.loop.drain(WAIT_S)
        assert bench.loop.stats().kv_blocks_used == 0


def test_drain_waits_for_what_runs_and_refuses_the_rest(lookahead: bool) -> None:
    with running(lookahead=lookahead) as bench:
        bench.held = True
        bench.loop.submit(request("a"))
        bench.wait_for_step()
        outcome: list[bool] = []
        thread = threading.Thread(target=lambda: outcome.append(bench.loop.drain(WAIT_S)))
        thread.start()
        while True:  # until the other thread has begun to drain
            try:
                bench.loop.submit(request("b", max_tokens=1))
            except Draining:
                break
            except AssertionError:  # the id is in use: it got in before
                continue
        bench.held = False
        bench.go_on.release()
        thread.join(WAIT_S)
        assert outcome == [True]
        assert bench.until_end("a")[-1].finish_reason is FinishReason.LENGTH


def test_drain_aborts_what_is_left_after_its_timeout(lookahead: bool) -> None:
    with running(lookahead=lookahead) as bench:
        bench.held = True
        bench.loop.submit(request("a", max_tokens=100))
        bench.wait_for_step()
        threading.Timer(0.05, bench.go_on.release, args=(2,)).start()
        assert not bench.loop.drain(0.0)
        assert bench.until_end("a")[-1].finish_reason is FinishReason.ABORT


def test_stop_ends_every_request(lookahead: bool) -> None:
    bench = Bench(lookahead=lookahead)
    bench.loop.start()
    bench.held = True
    bench.loop.submit(request("a", max_tokens=100))
    bench.wait_for_step()
    bench.loop.submit(request("b"))
    bench.go_on.release()
    bench.held = False
    bench.loop.stop()
    bench.loop.stop()
    assert not bench.loop.alive
    last = {e.request_id: e for batch in list(bench.batches.queue) for e in batch}
    assert last.keys() == {"a", "b"}
    assert all(event.finish_reason for event in last.values())


def test_stop_before_start_ends_every_request(lookahead: bool) -> None:
    bench = Bench(lookahead=lookahead)
    bench.loop.submit(request("a"))
    bench.loop.stop()
    assert bench.until_end("a")[-1].finish_reason is FinishReason.ABORT


def test_stats_count_tokens_and_return_to_zero(lookahead: bool) -> None:
    with running(lookahead=lookahead) as bench:
        for name in "ab":
            bench.loop.submit(request(name))
            bench.until_end(name)
        stats = bench.loop.stats()
    assert (stats.prompt_tokens_total, stats.generation_tokens_total) == (6, 6)
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
    assert stats.kv_blocks_total == 64
    assert stats.last_step_s > 0


def test_many_threads_submit_and_abort_and_each_request_ends_once(lookahead: bool) -> None:
    with running(lookahead=lookahead, max_waiting=1000) as bench:

        def work(worker: int) -> None:
            for index in range(50):
                bench.loop.submit(request(f"{worker}-{index}", max_tokens=1 + index % 4))
                if index % 3 == 0:
                    bench.loop.abort(f"{worker}-{index}")

        threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert bench.loop.drain(WAIT_S)
    assert bench.loop._door.num_waiting == 0
    ended = [
        event.request_id
        for batch in list(bench.batches.queue)
        for event in batch
        if event.finish_reason or event.error
    ]
    assert len(ended) == len(set(ended)) == 200


# -- looking ahead --------------------------------------------------------------------------------


def test_the_next_step_is_submitted_while_one_is_under_way() -> None:
    with running(lookahead=True) as bench:
        bench.held = True
        bench.loop.submit(request("a", max_tokens=4))
        for step in range(1, 4):
            bench.wait_for_step()
            assert len(bench.runner.submitted) == step + 1
            bench.go_on.release()
        bench.wait_for_step()
        assert len(bench.runner.submitted) == 4  # nothing is planned beyond the last token
        bench.go_on.release()
        assert tokens(bench.until_end("a")) == bench.runner.expected((1, 2, 3), None, 4)


def test_a_runner_that_does_not_look_ahead_gets_one_plan_at_a_time() -> None:
    with running() as bench:
        bench.held = True
        bench.loop.submit(request("a", max_tokens=4))
        for step in range(1, 5):
            bench.wait_for_step()
            assert len(bench.runner.submitted) == step
            bench.go_on.release()


def test_new_requests_join_the_next_plan_while_steps_are_under_way() -> None:
    with running(lookahead=True) as bench:
        bench.held = True
        bench.loop.submit(request("a", max_tokens=50))
        bench.wait_for_step()
        bench.loop.submit(request("b"))
        bench.go_on.release()
        bench.wait_for_step()
        assert bench.runner.submitted == [["a"], ["a"], ["a", "b"]]


def test_an_abort_under_two_steps_takes_effect_in_the_next_plan() -> None:
    with running(lookahead=True) as bench:
        bench.held = True
        bench.loop.submit(request("a", max_tokens=50))
        bench.loop.submit(request("b", max_tokens=50))
        bench.wait_for_step()
        bench.loop.abort("a")
        bench.go_on.release()
        bench.wait_for_step()
        assert bench.runner.submitted[-1] == ["b"]
        bench.go_on.release()
        events = bench.until_end("a")
        assert events[-1].finish_reason is FinishReason.ABORT
        assert len(tokens(events)) == 1


def test_a_token_after_the_end_is_dropped_and_drain_lands_its_step() -> None:
    expected = Bench().runner.expected((1, 2, 3), None, 2)
    with running(lookahead=True, eos=expected[0]) as bench:
        bench.held = True
        bench.loop.submit(request("a", max_tokens=50))
        bench.wait_for_step()
        bench.go_on.release()
        (event,) = bench.until_end("a")
        assert (event.token_ids, event.finish_reason) == ((expected[0],), FinishReason.STOP)
        bench.wait_for_step()  # the step planned ahead is still under way
        assert bench.loop.stats().kv_blocks_used == 1
        outcome: list[bool] = []
        thread = threading.Thread(target=lambda: outcome.append(bench.loop.drain(WAIT_S)))
        thread.start()
        thread.join(0.05)
        assert not outcome
        bench.go_on.release()
        thread.join(WAIT_S)
        assert outcome == [True]
        assert bench.loop.stats().kv_blocks_used == 0
        assert bench.runner.steps == 2


def test_a_plan_that_is_refused_ends_its_requests_after_the_older_step_has_landed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with running(lookahead=True) as bench, caplog.at_level(logging.CRITICAL + 1):
        bench.submit_faults = [None, RuntimeError("planted")]
        bench.loop.submit(request("a", max_tokens=50))
        events = bench.until_end("a")
        assert tokens(events) == bench.runner.expected((1, 2, 3), None, 1)
        assert isinstance(events[-1].error, EngineFailure)
        bench.loop.submit(request("b"))
        assert tokens(bench.until_end("b")) == bench.runner.expected((1, 2, 3), None, 3)
        assert bench.loop.stats().kv_blocks_used == 0


def test_a_step_that_fails_spares_who_joined_in_the_younger_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with running(lookahead=True) as bench, caplog.at_level(logging.CRITICAL + 1):
        bench.held = True
        bench.loop.submit(request("a", max_tokens=50))
        bench.wait_for_step()
        bench.loop.submit(request("b", prompt=(4, 5)))
        bench.go_on.release()
        bench.wait_for_step()  # the second; the third, with b, has been submitted
        assert bench.runner.submitted[-1] == ["a", "b"]
        bench.fault = RuntimeError("planted")
        bench.held = False
        bench.go_on.release()
        assert isinstance(bench.until_end("a")[-1].error, EngineFailure)
        assert tokens(bench.until_end("b")) == bench.runner.expected((4, 5), None, 3)


def test_stop_lands_what_is_under_way_and_delivers_it() -> None:
    with running(lookahead=True) as bench:
        bench.held = True
        bench.loop.submit(request("a", max_tokens=50))
        bench.wait_for_step()
        stopper = threading.Thread(target=bench.loop.stop)
        stopper.start()
        while True:  # until the stop has been asked for
            try:
                bench.loop.submit(request("b"))
            except Draining:
                break
            except AssertionError:  # the id is in use: it got in before
                continue
        bench.go_on.release(2)
        stopper.join(WAIT_S)
        assert bench.runner.steps == len(bench.runner.submitted) == 2
        events = bench.until_end("a")
        assert tokens(events) == bench.runner.expected((1, 2, 3), None, 2)
        assert events[-1].finish_reason is FinishReason.ABORT


def test_a_step_lasts_from_landing_to_landing(
    lookahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(lookahead=lookahead)
    monkeypatch.setattr("shoal.server.engine.loop.time.perf_counter", lambda: bench.clock_s)
    bench.loop.submit(request("a", max_tokens=5))
    bench.loop.start()
    bench.until_end("a")
    bench.loop.stop()
    assert bench.loop.stats().steps_total == 5
    assert bench.loop.stats().last_step_s == 1.0  # each step moves the clock by a second
