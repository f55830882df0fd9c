"""One HTTP request's token events: quota taken, adapter pinned, engine requests run.

The only place that takes from the library and the engine, and it gives back exactly once however
the request ends: finished, failed, stopped, or left by its client. It lives where the engine does
and knows neither text nor JSON; ``generation.py``, which may be in another process, makes text of
what it yields.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import anyio
import anyio.lowlevel

from shoal.adapters.blending import Blend
from shoal.adapters.errors import AdapterTooLarge, BlendRefused
from shoal.adapters.spec import AdapterSpec
from shoal.server.engine.request import FinishReason, Request, TokenEvent
from shoal.server.errors import Draining, EngineFailure, Overloaded
from shoal.server.http.adapter_errors import from_adapter_error
from shoal.server.http.quotas import Grant

if TYPE_CHECKING:
    from shoal.server.http.jobs import Job
    from shoal.server.http.services import Services

logger = logging.getLogger(__name__)

Event = tuple[int, TokenEvent]
Emit = Callable[[int, TokenEvent], None]


@dataclass(frozen=True, slots=True)
class Over:
    """What a queue of events ends with."""

    error: Exception | None


class Run(Protocol):
    """A job under way. Its events are asked for once."""

    def events(self) -> AsyncGenerator[Event, None]:
        """Choice and event: all choices', each choice's in order. Close it to abort what runs.

        A choice's last event has a ``finish_reason``; none has an error, or was aborted by
        anything but closing.

        Raises:
            ShoalError: nothing more will come; its message is for the client.
        """
        ...

    def stop(self, index: int) -> None:
        """A choice is complete, by a rule that the engine does not know; its events end."""
        ...


async def merged(
    queue: "asyncio.Queue[Event | Over]", *, merge: bool
) -> AsyncGenerator[Event, None]:
    """What a queue brings until it has ended.

    Args:
        merge: what has come since the consumer asked last is one event, so that a busy event loop
            falls behind by a few steps and no further.

    Raises:
        Exception: that which it ended with.
    """
    held: Event | Over | None = None
    while True:
        item, held = held or await queue.get(), None
        if isinstance(item, Over):
            if item.error is not None:
                raise item.error
            return
        index, event = item
        if merge and not queue.empty():
            later: list[TokenEvent] = []
            while held is None and not queue.empty():
                after = queue.get_nowait()
                if isinstance(after, Over) or after[0] != index:
                    held = after
                else:
                    later.append(after[1])
            event = event.then(later)
        yield index, event


class LocalRun:
    """Runs a job on the engine of this process."""

    def __init__(self, services: "Services", job: "Job") -> None:
        self._services = services
        self._job = job
        self._choices: list[_Choice] = []
        self._tokens = 0

    def stop(self, index: int) -> None:
        """As ``Run``."""
        if self._choices:
            self._choices[index].stop()

    async def events(self) -> AsyncGenerator[Event, None]:
        """As ``Run``."""
        # Bounded by the engine's limits, as is what waits there.
        queue: asyncio.Queue[Event | Over] = asyncio.Queue()

        async def work() -> None:
            error: Exception | None = None
            try:
                await self.run(lambda index, event: queue.put_nowait((index, event)))
            except Exception as problem:  # handed to the consumer, who raises it
                error = problem
            queue.put_nowait(Over(error))

        working = asyncio.create_task(work())
        try:
            # What comes behind a stop string is neither counted nor shown, so it must not be in
            # the event that completes it.
            async with aclosing(merged(queue, merge=not self._job.stops)) as events:
                async for event in events:
                    yield event
        finally:
            working.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.gather(working, return_exceptions=True)

    async def run(self, emit: Emit) -> None:
        """Do the job, telling of its events as they come; cancel it to abort what runs.

        Raises:
            ShoalError: nothing more will come; its message is for the client.
        """
        job = self._job
        with self._services.quotas.begin(job.tenant, job.limits) as grant:
            grant.charge(sum(map(len, job.prompts)))
            try:
                async with _staged(self._services, job) as adapter:
                    await self._all(adapter, grant, emit)
            except Overloaded:
                if not self._tokens:
                    grant.take_back()
                raise

    async def _all(self, adapter: AdapterSpec | None, grant: Grant, emit: Emit) -> None:
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        job, services = self._job, self._services

        def told(index: int, event: TokenEvent) -> None:
            self._tokens += len(event.token_ids)
            grant.charge(len(event.token_ids))
            emit(index, event)

        def ended(error: Exception | None) -> None:
            if over.done():
                return
            if error is not None:
                over.set_exception(error)
            elif all(choice.over for choice in self._choices):
                over.set_result(None)

        self._choices = [
            _Choice(services, job, index, told, ended) for index in range(job.num_choices)
        ]
        try:
            for choice in self._choices:
                choice.begin(adapter)
            await over
        finally:
            for choice in self._choices:
                choice.leave()


class _Choice:
    """One engine request of a run.

    Attributes:
        over: nothing more will come of it.
    """

    def __init__(
        self,
        services: "Services",
        job: "Job",
        index: int,
        told: Emit,
        ended: Callable[[Exception | None], None],
    ) -> None:
        self._services = services
        self._job = job
        self._index = index
        self._told = told
        self._ended = ended
        self._id = f"{job.id}-{index}"
        self._times = _Times(services, job, len(job.prompt_of(index)))
        self._abort: Callable[[], None] | None = None
        self._begun = False
        self.over = False

    def begin(self, adapter: AdapterSpec | None) -> None:
        """Submit it. Raises Overloaded, Draining."""
        job = self._job
        self._begun = True
        request = Request(
            id=self._id,
            prompt_ids=job.prompt_of(self._index),
            sampling=job.sampling_of(self._index),
            adapter=adapter,
            tenant=job.tenant,
            weight=job.limits.weight,
            arrival_s=job.arrival_s,
            deadline_s=job.deadline_s,
        )
        self._abort = self._services.engine.follow(request, self._take)

    def stop(self) -> None:
        """It is complete, by a rule that the engine does not know."""
        if not self.over:
            self._times.reason = str(FinishReason.STOP)
            self._end()

    def leave(self) -> None:
        """Give back what it has; what still runs is aborted."""
        self.over = True
        if self._abort is not None:
            self._abort()
            self._abort = None
        if self._begun:
            self._begun = False
            self._times.ended(self._id)

    def _take(self, event: TokenEvent) -> None:
        if event.error is not None:
            self._end(event.error)
        elif event.finish_reason is FinishReason.ABORT:
            # Not by our client: then nobody would be told.
            if self._services.draining:
                self._end(Draining("the server shut down before the answer was complete"))
            else:
                text = "the engine ended this request before its answer was complete"
                self._end(EngineFailure(text))
        else:
            self._times.tokens(event)
            if event.finish_reason is not None:
                self._times.reason = str(event.finish_reason)
            self._told(self._index, event)
            if event.finish_reason is not None:
                self._end()

    def _end(self, error: Exception | None = None) -> None:
        self.leave()
        self._ended(error)


class _Times:
    """Latencies and counts of one engine request."""

    def __init__(self, services: "Services", job: "Job", prompt_tokens: int) -> None:
        self._metrics = services.metrics
        self._job = job
        self._prompt_tokens = prompt_tokens
        self._count = 0
        self._first_s = 0.0
        self._last_s = 0.0
        self.reason = "abort"

    def tokens(self, event: TokenEvent) -> None:
        count = len(event.token_ids)
        if not count:
            return
        now = time.monotonic()
        if self._count == 0:
            self._first_s = now
            self._metrics.queue_time.observe(event.queue_s)
            self._metrics.time_to_first_token.observe(now - self._job.arrival_s)
        else:
            self._metrics.inter_token_latency.observe(now - self._last_s)
        for _ in range(count - 1):  # that came together
            self._metrics.inter_token_latency.observe(0.0)
        self._last_s = now
        self._count += count

    def ended(self, request_id: str) -> None:
        job, elapsed_s = self._job, time.monotonic() - self._job.arrival_s
        self._metrics.prompt_length.observe(self._prompt_tokens)
        self._metrics.generation_length.observe(self._count)
        if self._count:
            self._metrics.e2e_latency.observe(elapsed_s)
        self._metrics.request_ended(
            reason=self.reason, adapter=job.adapter_label, tokens=self._count, tenant=job.tenant
        )
        logger.info(
            "request=%s model=%s prompt_tokens=%d tokens=%d ttft_s=%.3f total_s=%.3f end=%s",
            request_id,
            job.model,
            self._prompt_tokens,
            self._count,
            self._first_s - job.arrival_s if self._count else 0.0,
            elapsed_s,
            self.reason,
        )


@asynccontextmanager
async def _staged(services: "Services", job: "Job") -> AsyncIterator[AdapterSpec | None]:
    """The job's adapter, packed and pinned in host memory while the block runs."""
    if job.adapter is None:
        yield None
        return
    info, library = job.adapter, services.library
    began = time.monotonic()
    pins: list[AdapterSpec] = []
    left = False
    guard = threading.Lock()

    def stage() -> None:
        spec = library.stage_blend(info) if isinstance(info, Blend) else library.stage(info)
        with guard:
            if not left:
                pins.append(spec)
                return
        library.unstage(spec)  # the request was cancelled while this thread worked

    def stage_resident() -> bool:
        # Behind adapters that a slow store is being asked for, it would wait as long as they do.
        spec = library.stage_resident(info)
        if spec is not None:
            pins.append(spec)
        return spec is not None

    try:
        try:
            if not stage_resident():
                pool = services.compose if isinstance(info, Blend) else services.load
                await pool(stage, owner=job.tenant)
        except AdapterTooLarge as error:
            raise Overloaded(
                f"no room for adapter {job.adapter_name!r} just now: {error}"
            ) from error
        except BlendRefused as error:
            raise from_adapter_error(error, param="adapters") from error
        services.metrics.stage_latency.observe(time.monotonic() - began)
        # A client that left while the thread worked is not worth a step.
        await anyio.lowlevel.checkpoint_if_cancelled()
        yield pins[0]
    finally:
        with guard:
            left = True
        for spec in pins:
            library.unstage(spec)
