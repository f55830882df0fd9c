"""One HTTP request's generation: adapter pinned, engine requests run, tokens turned into text.

The only place that takes from the library and the engine, and it gives back exactly once however
the request ends: finished, failed, stopped by a string, or left by its client. Knows nothing of
JSON or OpenAI's shapes.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import anyio
import anyio.lowlevel

from shoal.adapters.blending import Blend
from shoal.adapters.errors import AdapterTooLarge, BlendRefused
from shoal.adapters.spec import AdapterSpec
from shoal.server.engine.request import FinishReason, Request, TokenEvent, TokenLogprobs
from shoal.server.errors import Draining, EngineFailure, Overloaded
from shoal.server.http.jobs import Job
from shoal.server.http.quotas import Grant
from shoal.server.http.services import Services, TextStream, from_adapter_error
from shoal.server.http.stop_strings import StopMatcher

logger = logging.getLogger(__name__)

# Deltas waiting for a slow client, for requests with several choices.
_MERGE_MAX = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What became known of one choice.

    Attributes:
        text: final text; may be empty while something is held back.
        finish_reason: set on a choice's last delta only.
        stop_reason: the stop string, or stop token id, that ended it; ``"deadline"`` (with
            ``length``, which clients know) when its deadline did; None for end of sequence.
    """

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class Usage:
    """Token counts; prompts count once, however many choices they have."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0

    def as_json(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(slots=True)
class Generation:
    """Runs a job. ``usage`` grows while ``deltas`` is read, and is final after its last delta."""

    services: Services
    job: Job
    usage: Usage = field(init=False)

    def __post_init__(self) -> None:
        self.usage = Usage(sum(len(ids) for ids in self.job.prompts))

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """All choices' deltas, each choice in order. Close it to abort what still runs.

        Raises:
            ShoalError: nothing more will come; its message is for the client.
        """
        job = self.job
        with self.services.quotas.begin(job.tenant, job.limits) as grant:
            grant.charge(self.usage.prompt_tokens)
            try:
                async with aclosing(self._run(grant)) as deltas:
                    async for delta in deltas:
                        yield delta
            except Overloaded:
                if not self.usage.completion_tokens:
                    grant.take_back()
                raise

    async def _run(self, grant: Grant) -> AsyncGenerator[Delta, None]:
        async with _staged(self.services, self.job) as adapter:
            runs = [self._choice(i, adapter, grant) for i in range(self.job.num_choices)]
            source = runs[0] if len(runs) == 1 else _merge(runs)
            async with aclosing(source):
                async for delta in source:
                    yield delta

    async def _choice(
        self, index: int, adapter: AdapterSpec | None, grant: Grant
    ) -> AsyncGenerator[Delta, None]:
        job = self.job
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
        stream = self.services.tokenizer.stream(job.skip_special)
        text = _ChoiceText(index, job, stream)
        times = _Times(self.services, job, len(request.prompt_ids))
        try:
            # What comes behind a stop string is neither counted nor shown, so it must not be in
            # the event that completes it.
            merge = not job.stops
            async with aclosing(self.services.engine.generate(request, merge=merge)) as events:
                async for event in events:
                    self._check(event)
                    times.tokens(event)
                    self.usage.completion_tokens += len(event.token_ids)
                    grant.charge(len(event.token_ids))
                    if index % job.n == 0:
                        self.usage.cached_tokens += event.cached_tokens
                    delta = text.take(event)
                    if delta.finish_reason is not None:
                        times.reason = str(event.finish_reason or delta.finish_reason)
                        yield delta
                        return
                    if delta.text or delta.token_ids:
                        yield delta
        finally:
            times.ended(request.id)

    def _check(self, event: TokenEvent) -> None:
        if event.error is not None:
            raise event.error
        if event.finish_reason is FinishReason.ABORT:
            # Not by our client: then nobody would be reading.
            if self.services.draining:
                raise Draining("the server shut down before the answer was complete")
            raise EngineFailure("the engine ended this request before its answer was complete")


class _ChoiceText:
    """Token events of one choice in, deltas out."""

    def __init__(self, index: int, job: Job, stream: TextStream) -> None:
        self._index = index
        self._stop_ids = job.sampling.stop_token_ids
        self._include_stop = job.include_stop
        self._min_tokens = job.sampling.min_tokens
        self._stream = stream
        self._stops = StopMatcher(job.stops, include=job.include_stop)
        self._tokens = 0

    def take(self, event: TokenEvent) -> Delta:
        shown = event.token_ids
        ended_by_id = event.finish_reason is FinishReason.STOP and bool(shown)
        last_is_stop_id = ended_by_id and shown[-1] in self._stop_ids
        if ended_by_id and not (last_is_stop_id and self._include_stop):
            shown = shown[:-1]
        text = self._push(shown)
        reason = event.finish_reason
        stop_reason: str | int | None = None
        if last_is_stop_id:
            stop_reason = event.token_ids[-1]
        if reason is not None and self._stops.matched is None:
            text += self._stops.push(self._stream.flush())
            if self._stops.matched is None:
                text += self._stops.flush()
        if self._stops.matched is not None:
            reason = FinishReason.STOP
        elif reason is FinishReason.DEADLINE:
            reason, stop_reason = FinishReason.LENGTH, "deadline"
        return Delta(
            index=self._index,
            text=text,
            token_ids=event.token_ids,
            logprobs=event.logprobs,
            finish_reason=reason,
            stop_reason=self._stops.matched or stop_reason,
        )

    def _push(self, ids: Sequence[int]) -> str:
        self._tokens += len(ids)
        text = self._stream.push(ids)
        if self._tokens < self._min_tokens:
            return text  # stop strings count from min_tokens on, as ends of sequence do
        return self._stops.push(text)


class _Times:
    """Latencies and counts of one engine request."""

    def __init__(self, services: Services, job: Job, prompt_tokens: int) -> None:
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
async def _staged(services: Services, job: Job) -> AsyncIterator[AdapterSpec | None]:
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


async def _merge(runs: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """Deltas of all runs as they come; the first error ends them all."""
    queue: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue(_MERGE_MAX)

    async def forward(run: AsyncGenerator[Delta, None]) -> None:
        end: BaseException | None = None
        try:
            async with aclosing(run):
                async for delta in run:
                    await queue.put(delta)
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
