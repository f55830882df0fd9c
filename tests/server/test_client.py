"""The asyncio side of the engine: order, errors, and consumers that leave."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from functools import partial

import pytest

from shoal.adapters.slots import SlotTable
from shoal.server.engine.client import EngineClient
from shoal.server.engine.loop import EngineLoop
from shoal.server.engine.plan import StepPlan
from shoal.server.engine.request import FinishReason, Request, SamplingParams, TokenEvent
from shoal.server.engine.scheduler import Scheduler, SchedulerLimits
from shoal.server.errors import Draining, EngineFailure, Overloaded, PromptTooLong
from shoal.server.model.fake import FakeRunner

LIMITS = SchedulerLimits(
    block_tokens=4,
    num_blocks=1024,
    max_num_seqs=64,
    max_num_batched_tokens=512,
    max_model_len=4000,
    max_waiting=100,
)


def a_moment(_: StepPlan) -> None:
    """Lets other threads go on, as waiting for a device does."""
    time.sleep(1e-4)


@asynccontextmanager
async def engine(
    before_step: Callable[[StepPlan], None] = a_moment,
) -> AsyncIterator[tuple[EngineClient, FakeRunner]]:
    runner = FakeRunner(1000, 4, before_step=before_step)
    scheduler = Scheduler(LIMITS, SlotTable(2, 10), frozenset())
    client = EngineClient(partial(EngineLoop, scheduler, runner))
    await client.start()
    try:
        yield client, runner
    finally:
        await client.stop()


def request(name: str, max_tokens: int = 3, prompt: tuple[int, ...] = (1, 2, 3)) -> Request:
    return Request(id=name, prompt_ids=prompt, sampling=SamplingParams(max_tokens=max_tokens))


async def collect(client: EngineClient, asked: Request) -> list[TokenEvent]:
    return [event async for event in client.generate(asked)]


def run(test: Coroutine[None, None, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 30))


async def until_idle(client: EngineClient) -> None:
    while client.stats().running or client.stats().waiting:
        await asyncio.sleep(0.001)


def test_the_iterator_yields_all_tokens_in_order_and_ends() -> None:
    async def test() -> None:
        async with engine() as (client, runner):
            events = await collect(client, request("a", 10))
            assert [t for e in events for t in e.token_ids] == runner.expected((1, 2, 3), None, 10)
            assert events[-1].finish_reason is FinishReason.LENGTH

    run(test())


def test_a_consumer_that_fell_behind_gets_what_came_as_one_event() -> None:
    async def test() -> None:
        async with engine() as (client, runner):
            async with aclosing(client.generate(request("a", 20), merge=True)) as events:
                first = await anext(events)
                while client.stats().generation_tokens_total < 20:
                    await asyncio.sleep(0.001)
                await asyncio.sleep(0.05)  # the last step's are on their way
                rest = [event async for event in events]
            assert len(rest) == 1
            tokens = [*first.token_ids, *rest[0].token_ids]
            assert tokens == runner.expected((1, 2, 3), None, 20)
            assert rest[0].finish_reason is FinishReason.LENGTH
            assert first.queue_s >= 0

    run(test())


def test_tokens_made_before_a_failure_are_not_lost_with_it() -> None:
    may_fail, failed = threading.Event(), threading.Event()
    steps: list[StepPlan] = []

    def fail_later(plan: StepPlan) -> None:
        time.sleep(1e-4)
        steps.append(plan)
        if may_fail.is_set():
            failed.set()
            raise RuntimeError("the device went away")

    async def test() -> None:
        async with (
            engine(fail_later) as (client, _),
            aclosing(client.generate(request("a", 1000), merge=True)) as events,
        ):
            await anext(events)
            enough = len(steps) + 5
            while len(steps) < enough:  # the event loop stands still, the engine does not
                time.sleep(0.001)
            may_fail.set()
            assert failed.wait(30)
            assert (await anext(events)).token_ids
            with pytest.raises(EngineFailure):
                async for _ in events:
                    pass

    run(test())


def test_followed_events_are_told_until_one_leaves() -> None:
    async def test() -> None:
        async with engine() as (client, runner):
            told: dict[str, list[TokenEvent]] = {"a": [], "b": []}
            done = asyncio.Event()

            def sink(event: TokenEvent) -> None:
                told[event.request_id].append(event)
                if event.request_id == "b" and len(told["b"]) == 1:
                    leave_b()
                if event.request_id == "a" and event.finish_reason is not None:
                    done.set()
                raise RuntimeError("a consumer's bug harms nobody")

            leave_a = client.follow(request("a", 30), sink)
            leave_b = client.follow(request("b", 1000), sink)
            with pytest.raises(AssertionError, match="in use"):
                client.follow(request("a", 1), sink)
            await asyncio.wait_for(done.wait(), 30)
            leave_a()
            leave_a()
            tokens = [token for event in told["a"] for token in event.token_ids]
            assert tokens == runner.expected((1, 2, 3), None, 30)
            assert len(told["b"]) == 1
            while client.stats().running:
                await asyncio.sleep(0.001)
            assert not client._sinks

    run(test())


def test_many_requests_at_once_get_their_own_tokens() -> None:
    async def test() -> None:
        async with engine() as (client, runner):
            prompts = [(i, i + 1, i + 2) for i in range(50)]
            asked = [request(str(i), 8, prompt) for i, prompt in enumerate(prompts)]
            answers = await asyncio.gather(*(collect(client, each) for each in asked))
            for prompt, events in zip(prompts, answers, strict=True):
                assert [t for e in events for t in e.token_ids] == runner.expected(prompt, None, 8)

    run(test())


def test_a_step_costs_the_event_loop_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        calls = 0
        async with engine() as (client, _):
            loop = asyncio.get_running_loop()
            original = loop.call_soon_threadsafe

            def counted(*args: object, **kwargs: object) -> object:
                nonlocal calls
                calls += 1
                return original(*args, **kwargs)  # type: ignore[arg-type]

            monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
            await asyncio.gather(*(collect(client, request(str(i), 20)) for i in range(20)))
            assert calls <= client.stats().steps_total
            monkeypatch.undo()

    run(test())


def test_closing_the_iterator_aborts_the_request() -> None:
    async def test() -> None:
        async with engine() as (client, _):
            async with aclosing(client.generate(request("a", 3000))) as events:
                async for _ in events:
                    break
            await until_idle(client)
            assert client.stats().kv_blocks_used == 0
            assert client.stats().generation_tokens_total < 3000

    run(test())


def test_cancelling_the_consumer_aborts_the_request() -> None:
    async def test() -> None:
        async with engine() as (client, _):
            task = asyncio.create_task(collect(client, request("a", 3000)))
            while not client.stats().steps_total:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until_idle(client)
            assert client.stats().generation_tokens_total < 3000

    run(test())


def test_an_iterator_that_is_dropped_aborts_the_request() -> None:
    async def test() -> None:
        async with engine() as (client, _):
            async for _ in client.generate(request("a", 3000)):
                break
            await until_idle(client)
            assert client.stats().generation_tokens_total < 3000

    run(test())


def test_error_events_raise_their_error() -> None:
    async def test() -> None:
        async with engine() as (client, _):
            with pytest.raises(PromptTooLong):
                await collect(client, request("a", prompt=(1,) * 4000))

    run(test())


def test_a_failed_step_raises_engine_failure_and_the_next_request_works(
    caplog: pytest.LogCaptureFixture,
) -> None:
    faults = [RuntimeError("planted")]

    def before_step(plan: StepPlan) -> None:
        if faults:
            raise faults.pop()

    async def test() -> None:
        async with engine(before_step) as (client, _):
            with pytest.raises(EngineFailure):
                await collect(client, request("a"))
            assert len(await collect(client, request("a"))) == 3

    run(test())


def test_a_refused_request_leaves_no_trace() -> None:
    async def test() -> None:
        async with engine() as (client, _):
            assert await client.drain(1.0)
            with pytest.raises(Draining):
                await collect(client, request("a"))
            assert client.stats().waiting == 0

    run(test())


def test_overload_is_raised_before_the_first_event() -> None:
    gate = threading.Event()

    async def test() -> None:
        async with engine(lambda plan: assert_set(gate)) as (client, _):
            asked = [request(str(index)) for index in range(LIMITS.max_waiting)]
            tasks = [asyncio.create_task(collect(client, each)) for each in asked]
            await asyncio.sleep(0)  # all are submitted, and no step can end
            with pytest.raises(Overloaded):
                await anext(client.generate(request("one too many")))
            gate.set()
            assert all(len(events) == 3 for events in await asyncio.gather(*tasks))

    run(test())


def assert_set(gate: threading.Event) -> None:
    assert gate.wait(20)


def test_drain_lets_running_requests_finish() -> None:
    async def test() -> None:
        async with engine() as (client, _):
            task = asyncio.create_task(collect(client, request("a", 200)))
            while not client.stats().steps_total:
                await asyncio.sleep(0.001)
            assert await client.drain(20.0)
            assert (await task)[-1].finish_reason is FinishReason.LENGTH

    run(test())


def test_stop_ends_the_iterators() -> None:
    async def test() -> None:
        async with engine() as (client, _):
            task = asyncio.create_task(collect(client, request("a", 3000)))
            while not client.stats().steps_total:
                await asyncio.sleep(0.001)
            await client.stop()
            assert (await task)[-1].finish_reason is FinishReason.ABORT
            assert not client.alive

    run(test())
