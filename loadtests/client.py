"""Sends a planned load to an OpenAI-style server and records when each token arrived.

Open loop: a request is sent at its planned time whether or not earlier ones have ended, unless
``max_concurrency`` says otherwise. Knows nothing of shoal beyond HTTP, so that it measures any
server with the same endpoints.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from shoal.loadtests.stats import Sample
from shoal.loadtests.workload import PlannedRequest

PAGE = 1000
# In which shoal names the adapter, and its version, that an answer is of.
ADAPTER_HEADER = "x-shoal-adapter"

# Tokenised by the server to get a vocabulary of ordinary words for the prompts.
TEXT = (
    "The harbour wakes before the town. Nets are mended, kettles whistle, and gulls argue over "
    "yesterday's bread. A child asks why the tide returns each morning; her grandfather points "
    "at the pale moon and tells a long story about patience, gravity, three stubborn whales and "
    "one borrowed lantern. Numbers matter too: 7 boats, 12 ropes, 365 mornings every year. Write "
    "a list, compare two plans, explain how bread rises, translate a greeting, plan a garden."
)


class ServerError(Exception):
    """The server under test did not answer as an OpenAI-style server does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientOptions:
    """How to talk to the server.

    Attributes:
        base_model: the name the server gives its base.
        max_concurrency: requests in flight at most; None for a pure open loop.
        timeout_s: for one request, from sending it to its last token.
    """

    base_url: str
    base_model: str
    api_key: str | None = None
    ignore_eos: bool = True
    temperature: float = 0.0
    max_concurrency: int | None = None
    timeout_s: float = 600.0


def connect(base_url: str, api_key: str | None, timeout_s: float = 600.0) -> httpx.AsyncClient:
    """A client without limits of its own, so that queueing happens in the server."""
    return httpx.AsyncClient(
        base_url=base_url,
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        timeout=httpx.Timeout(timeout_s),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
    )


async def list_models(client: httpx.AsyncClient, *, most: int | None = None) -> list[str]:
    """Every model name, the base first; follows the pages, until there are ``most``."""
    names: list[str] = []
    query: dict[str, Any] = {"limit": min(PAGE, most or PAGE)}
    while True:
        answer = await client.get("/v1/models", params=query)
        answer.raise_for_status()
        body = answer.json()
        names += [model["id"] for model in body["data"]]
        if not body.get("has_more") or (most and len(names) >= most):
            return names
        query["after"] = names[-1]


async def prompt_vocabulary(client: httpx.AsyncClient, model: str) -> list[int]:
    """Token ids of ordinary words, as this server's tokenizer sees them."""
    answer = await client.post("/tokenize", json={"model": model, "prompt": TEXT})
    answer.raise_for_status()
    return sorted(set(answer.json()["tokens"]))


async def drive(
    client: httpx.AsyncClient,
    options: ClientOptions,
    planned: Sequence[PlannedRequest],
    on_done: Callable[[Sample], None] = lambda sample: None,
    *,
    start: float | None = None,
) -> list[Sample]:
    """Send every planned request at its time; one sample each, in planned order.

    Args:
        start: what their times count from (``time.perf_counter``); None is now.
    """
    gate = asyncio.Semaphore(options.max_concurrency or len(planned))
    start = time.perf_counter() if start is None else start

    async def one(request: PlannedRequest) -> Sample:
        await asyncio.sleep(max(0.0, start + request.at_s - time.perf_counter()))
        async with gate:
            sample = await _send(client, options, request)
        on_done(sample)
        return sample

    return list(await asyncio.gather(*(one(request) for request in planned)))


async def _send(
    client: httpx.AsyncClient, options: ClientOptions, request: PlannedRequest
) -> Sample:
    sent = time.perf_counter()
    token_s: list[float] = []
    prompt_tokens, error = 0, None
    body = {
        "model": request.adapter or options.base_model,
        "prompt": list(request.prompt_ids),
        "max_tokens": request.max_tokens,
        "temperature": options.temperature,
        "ignore_eos": options.ignore_eos,
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    try:
        async with asyncio.timeout(options.timeout_s):
            async for event in _events(client, body, request.adapter):
                now = time.perf_counter()
                for choice in event.get("choices", ()):
                    token_s += [now] * len(choice.get("token_ids") or ())
                if usage := event.get("usage"):
                    prompt_tokens = usage["prompt_tokens"]
        if not token_s:
            error = "no tokens received"
    except (httpx.HTTPError, ServerError, TimeoutError) as problem:
        error = f"{type(problem).__name__}: {problem}"
    return Sample(
        index=request.index,
        adapter=request.adapter,
        sent_s=sent,
        token_s=tuple(token_s),
        done_s=time.perf_counter(),
        prompt_tokens=prompt_tokens,
        error=error,
    )


async def _events(
    client: httpx.AsyncClient, body: dict[str, Any], adapter: str | None
) -> AsyncIterator[dict[str, Any]]:
    """The JSON events of one streamed completion.

    Raises:
        ServerError: an error event, or the answer is said to be another adapter's.
    """
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            text = (await answer.aread()).decode(errors="replace")
            raise ServerError(f"HTTP {answer.status_code}: {text[:300]}")
        served = answer.headers.get(ADAPTER_HEADER)
        if served is not None and adapter not in (served, served.partition("@")[0]):
            raise ServerError(f"asked for {adapter}, the answer is {served}'s")
        async for line in answer.aiter_lines():
            if not line.startswith("data: "):
                continue
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                return
            event = json.loads(data)
            if "error" in event:
                raise ServerError(str(event["error"].get("message")))
            yield event
