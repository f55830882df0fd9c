"""The client against a tiny in-process server that speaks the streaming protocol."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from shoal.loadtests.client import ClientOptions, drive, list_models, prompt_vocabulary
from shoal.loadtests.run import match_adapters
from shoal.loadtests.workload import PlannedRequest

OPTIONS = ClientOptions(base_url="http://test", base_model="base")
Respond = Callable[[httpx.Request], httpx.Response | Awaitable[httpx.Response]]


def events(*items: object) -> httpx.Response:
    text = "".join(
        f"data: {item if isinstance(item, str) else json.dumps(item)}\n\n" for item in items
    )
    return httpx.Response(200, text=text)


def client(respond: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.MockTransport(respond), base_url="http://test")


def planned(count: int = 1, adapter: str | None = "a") -> list[PlannedRequest]:
    return [PlannedRequest(i, 0.0, adapter, (1, 2, 3), 4) for i in range(count)]


def test_tokens_are_counted_as_received_not_as_asked() -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        assert (body["model"], body["prompt"], body["max_tokens"]) == ("a", [1, 2, 3], 4)
        return events(
            {"choices": [{"text": "x", "token_ids": [5]}]},
            {"choices": [{"text": "yz", "token_ids": [6, 7]}]},
            {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 3}},
            "[DONE]",
        )

    async def go() -> None:
        async with client(respond) as http:
            (sample,) = await drive(http, OPTIONS, planned())
        assert sample.error is None
        assert len(sample.token_s) == 3
        assert sample.prompt_tokens == 3

    asyncio.run(go())


@pytest.mark.parametrize(
    ("response", "says"),
    [
        (httpx.Response(404, text="no such model"), "404"),
        (events({"error": {"message": "engine died"}}), "engine died"),
        (events("[DONE]"), "no tokens"),
    ],
)
def test_failures_are_samples_with_a_reason(response: httpx.Response, says: str) -> None:
    async def go() -> None:
        async with client(lambda _: response) as http:
            (sample,) = await drive(http, OPTIONS, planned())
        assert says in (sample.error or "")

    asyncio.run(go())


@pytest.mark.parametrize(
    ("asked", "served", "fine"),
    [
        ("a", "a@3", True),
        ("a@3", "a@3", True),
        ("acme/a", "acme/a@1", True),
        ("a", None, True),  # another kind of server
        ("a", "b@3", False),
        ("a@2", "a@3", False),
        (None, "a@1", False),
    ],
)
def test_an_answer_of_another_adapter_is_a_failure(
    asked: str | None, served: str | None, fine: bool
) -> None:
    def respond(_: httpx.Request) -> httpx.Response:
        answer = events({"choices": [{"text": "x", "token_ids": [5]}]}, "[DONE]")
        answer.headers.update({} if served is None else {"x-shoal-adapter": served})
        return answer

    async def go() -> None:
        async with client(respond) as http:
            (sample,) = await drive(http, OPTIONS, planned(adapter=asked))
        assert (sample.error is None) == fine

    asyncio.run(go())


def test_concurrency_never_exceeds_the_limit() -> None:
    flying, most = 0, 0

    async def respond(request: httpx.Request) -> httpx.Response:
        nonlocal flying, most
        flying += 1
        most = max(most, flying)
        await asyncio.sleep(0.001)
        flying -= 1
        return events({"choices": [{"token_ids": [1]}]}, "[DONE]")

    async def go() -> None:
        options = ClientOptions(base_url="http://test", base_model="base", max_concurrency=3)
        async with client(respond) as http:
            samples = await drive(http, options, planned(12))
        assert len(samples) == 12
        assert most == 3

    asyncio.run(go())


def test_model_pages_are_followed() -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        after = request.url.params.get("after")
        page = {None: (["base", "a"], True), "a": (["b"], False)}[after]
        return httpx.Response(
            200, json={"data": [{"id": name} for name in page[0]], "has_more": page[1]}
        )

    async def go() -> None:
        async with client(respond) as http:
            assert await list_models(http) == ["base", "a", "b"]

    asyncio.run(go())


def test_the_vocabulary_comes_from_the_servers_tokenizer() -> None:
    async def go() -> None:
        async with client(lambda _: httpx.Response(200, json={"tokens": [3, 1, 3]})) as http:
            assert await prompt_vocabulary(http, "base") == [1, 3]

    asyncio.run(go())


def test_adapter_patterns_keep_the_servers_order_and_refuse_misses() -> None:
    names = ["load-1", "pirate", "load-2"]
    assert match_adapters(names, "load-*", None) == ["load-1", "load-2"]
    assert match_adapters(names, "pirate,load-*", 2) == ["load-1", "pirate"]
    assert match_adapters(names, "", None) == []
    with pytest.raises(ValueError, match="none of 3"):
        match_adapters(names, "nobody", None)
