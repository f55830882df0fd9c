"""Runs a job and writes its answer, streamed or whole, in the shape the endpoint gives it.

A ``Shape`` is the difference between chat and plain completions: pure functions from deltas to
JSON. What they share (ids, usage, log-probabilities) is here too.
"""

import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.types import Send

from shoal.server.engine.request import FinishReason, TokenLogprobs
from shoal.server.http.generation import Delta, Generation
from shoal.server.http.jobs import Job
from shoal.server.http.schemas import Sampling
from shoal.server.http.services import Services, TextCodec
from shoal.server.http.streaming import WhileConnected, send_events, send_json

# JSON has no infinity; what vLLM says for a token that cannot be sampled.
_LEAST_LOGPROB = -9999.0

Json = dict[str, Any]


@dataclass(slots=True)
class Choice:
    """One finished choice."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason


class Shape(Protocol):
    """One endpoint's JSON."""

    def opening(self, index: int) -> Json | None:
        """A chunk to send before a choice's first delta."""
        ...

    def chunk(self, delta: Delta) -> Json:
        """The ``choices`` entry of one delta; deltas come in order for each choice."""
        ...

    def whole(self, index: int, choice: Choice) -> Json:
        """The ``choices`` entry of a finished choice."""
        ...

    @property
    def object_name(self) -> str: ...

    @property
    def chunk_object_name(self) -> str: ...

    def extra(self) -> Json:
        """Further top-level fields of the whole answer, and of a stream's first chunk."""
        ...


def answer(services: Services, body: Sampling, job: Job, shape: Shape) -> WhileConnected:
    """The response that does ``job``."""
    generation = Generation(services, job)

    async def stream(send: Send) -> None:
        chunks = _chunks(generation, body, shape)
        await send_events(send, chunks, job.headers, services.counts)

    async def whole(send: Send) -> None:
        choices = [Choice() for _ in range(job.num_choices)]
        async with aclosing(generation.deltas()) as deltas:
            async for delta in deltas:
                choices[delta.index].add(delta)
        content = {
            **_envelope(job, shape.object_name),
            "choices": [shape.whole(i, choice) for i, choice in enumerate(choices)],
            "usage": generation.usage.as_json(),
            **shape.extra(),
        }
        await send_json(send, content, job.headers)

    return WhileConnected(stream if body.stream else whole)


async def _chunks(generation: Generation, body: Sampling, shape: Shape) -> AsyncGenerator[Json]:
    job = generation.job
    envelope = _envelope(job, shape.chunk_object_name)
    opened: set[int] = set()
    extra = shape.extra()
    tokens_matter = bool(body.return_token_ids) or job.sampling.logprobs is not None

    def chunk(choices: list[Json]) -> Json:
        made = {**envelope, "choices": choices}
        if body.usage_in_every_chunk or not choices:
            made["usage"] = generation.usage.as_json()
        elif body.usage_in_stream:
            made["usage"] = None
        return made

    async with aclosing(generation.deltas()) as deltas:
        async for delta in deltas:
            if delta.index not in opened:
                opened.add(delta.index)
                opening = shape.opening(delta.index)
                if opening is not None:
                    yield chunk([opening]) | extra
                    extra = {}
            if delta.text or delta.finish_reason is not None or tokens_matter:
                yield chunk([shape.chunk(delta)]) | extra
                extra = {}
    if body.usage_in_stream:
        yield chunk([])


def _envelope(job: Job, object_name: str) -> Json:
    return {"id": job.id, "object": object_name, "created": job.created, "model": job.model}


@dataclass(frozen=True, slots=True)
class NamedLogprob:
    """A token as text and bytes (which may be part of a character), and its log-probability."""

    token: str
    bytes: bytes
    logprob: float
    top: tuple["NamedLogprob", ...] = ()


def name_logprobs(
    codec: TextCodec, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
) -> list[NamedLogprob]:
    """Put text and JSON-able numbers to what the engine reported."""

    def named(token_id: int, logprob: float, top: tuple[NamedLogprob, ...] = ()) -> NamedLogprob:
        finite = logprob if math.isfinite(logprob) else _LEAST_LOGPROB
        return NamedLogprob(codec.id_to_text(token_id), codec.id_to_bytes(token_id), finite, top)

    return [
        named(token_id, entry.logprob, tuple(named(*other) for other in entry.top))
        for token_id, entry in zip(token_ids, logprobs, strict=True)
    ]
