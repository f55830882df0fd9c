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
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
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

# Events waiting for a slow client, for requests with several choices.
_MERGE_MAX = 64

Event = tuple[int, TokenEvent]


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


class LocalRun:
    """Runs a job on the engine of this process."""

    def __init__(self, services: "Services", job: "Job") -> None:
        self._services = services
        self._job = job
        self._stopped: set[int] = set()

    def stop(self, index: int) -> None:
        """As ``Run``; what the engine makes of it until it hears of that is dropped."""
        self._stopped.add(index)

    async def events(self) -> AsyncGenerator[Event, None]:
        """As ``Run``."""
        job = self._job
        tokens = 0
        with self._services.quotas.begin(job.tenant, job.limits) as grant:
            grant.charge(sum(map(len, job.prompts)))
            try:
                async with aclosing(self._all(grant)) as events:
                    async for index, event in events:
                        tokens += len(event.token_ids)
                        yield index, event
            except Overloaded:
                if not tokens:
                    grant.take_back()
                raise

    async def _all(self, grant: Grant) -> AsyncGenerator[Event, None]:
        async with _staged(self._services, self._job) as adapter:
            runs = [self._choice(i, adapter, grant) for i in range(self._job.num_choices)]
            source = runs[0] if len(runs) == 1 else _merge(runs)
            async with aclosing(source):
                async for event in source:
                    yield event

    async def _choice(
        self, index: int, adapter: AdapterSpec | None, grant: Grant
    ) -> AsyncGenerator[Event, None]:
        job = self._job
        request = Request(
            id=f"{job.id}-{index}",
            prompt_ids=job.prompt_of(index),
            sampling=job.sampling_of(index),
            adapter=adapter,
            tenant=job.tenant,
            weight=job.limits.weight,
            arrival_s=job.arrival_s,
            deadline_s=job.deadline_s,
        )
        times = _Times(self._services, job, len(request.prompt_ids))
        try:
            # What comes behind a stop string is neither counted nor shown, so it must not be in
            # the event that completes it.
            merge = not job.stops
            async with aclosing(self._services.engine.generate(request, merge=merge)) as events:
                async for event in events:
                    if index in self._stopped:
                        return
                    self._check(event)
                    times.tokens(event)
                    grant.charge(len(event.token_ids))
                    if event.finish_reason is not None:
                        times.reason = str(event.finish_reason)
                    yield index, event
                    if event.finish_reason is not None or index in self._stopped:
                        return
        finally:
            if index in self._stopped and times.reason == "abort":
                times.reason = str(FinishReason.STOP)
            times.ended(request.id)

    def _check(self, event: TokenEvent) -> None:
        if event.error is not None:
            raise event.error
        if event.finish_reason is FinishReason.ABORT:
            # Not by our client: then nobody would be reading.
            if self._services.draining:
                raise Draining("the server shut down before the answer was complete")
            raise EngineFailure("the engine ended this request before its answer was complete")


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


async def _merge(runs: Sequence[AsyncGenerator[Event, None]]) -> AsyncGenerator[Event, None]:
    """Events of all runs as they come; the first error ends them all."""
    queue: asyncio.Queue[Event | BaseException | None] = asyncio.Queue(_MERGE_MAX)

    async def forward(run: AsyncGenerator[Event, None]) -> None:
        end: BaseException | None = None
        try:
            async with aclosing(run):
                async for event in run:
                    await queue.put(event)
        except Exception as error:  # handed to the consumer, who raises it
            end = error
        await queue.put(end)

    tasks = [asyncio.create_task(forward(run)) for run in runs]
    try:
        open_runs = len(tasks)
        while open_runs:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                open_runs -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.gather(*tasks, return_exceptions=True)
        for run in runs:
            await run.aclose()  # a task cancelled before it began never opened its run
