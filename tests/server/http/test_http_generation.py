"""Completions and chat: text, shapes, usage, stop strings, streams against whole answers."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

pytestmark = pytest.mark.anyio

Serve = Callable[..., Any]


def events(text: str) -> list[Any]:
    """Parsed ``data:`` events; ``[DONE]`` stays a string."""
    found = [part.removeprefix("data: ") for part in text.split("\n\n") if part]
    return [part if part == "[DONE]" else json.loads(part) for part in found]


async def test_tokens_are_the_engines_and_text_is_their_decoding(serve: Serve) -> None:
    async with serve() as h:
        prompt = h.tokenizer.encode("hello")
        answer = (await h.complete(ignore_eos=True, return_token_ids=True)).json()
        expected = h.runner.expected(prompt, None, 8)
    choice = answer["choices"][0]
    assert choice["token_ids"] == expected
    assert choice["prompt_token_ids"] == prompt
    assert choice["text"] == h.tokenizer.decode(expected)
    assert choice["finish_reason"] == "length"
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == "base"
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 8,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_end_of_sequence_ends_with_stop_and_is_not_text(serve: Serve) -> None:
    async with serve() as h:
        for seed in range(200):  # find a prompt whose answer ends by itself
            prompt = [seed % 200 + 3, seed // 200 + 3]
            expected = h.runner.expected(prompt, None, 12)
            if 1 in expected[1:]:
                break
        else:
            pytest.fail("no prompt with an early end of sequence")
        length = expected.index(1) + 1
        answer = (await h.complete(prompt=prompt, max_tokens=12, return_token_ids=True)).json()
        past = (await h.complete(prompt=prompt, max_tokens=12, ignore_eos=True)).json()
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["token_ids"] == expected[:length]
    assert choice["text"] == h.tokenizer.decode(expected[: length - 1])
    assert answer["usage"]["completion_tokens"] == length
    assert past["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize("route", ["chat", "complete"])
async def test_a_stream_says_what_the_whole_answer_says(serve: Serve, route: str) -> None:
    async with serve() as h:
        send = getattr(h, route)
        asked = {"max_tokens": 40, "ignore_eos": True, "n": 2, "return_token_ids": True}
        whole = (await send(**asked)).json()
        response = await send(**asked, stream=True, stream_options={"include_usage": True})
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, usage, done = events(response.text)
        assert h.all_given_back()
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 80
    assert {chunk["id"] for chunk in chunks} == {usage["id"]}
    assert all(chunk["usage"] is None for chunk in chunks)
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        if route == "chat":
            assert mine[0]["delta"] == {"role": "assistant", "content": ""}
            text = "".join(c["delta"].get("content", "") for c in mine)
            assert text == choice["message"]["content"]
        else:
            assert "".join(c["text"] for c in mine) == choice["text"]
        assert [i for c in mine for i in c.get("token_ids", ())] == choice["token_ids"]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == ["length"]


async def test_several_prompts_times_n_are_neighbours(serve: Serve) -> None:
    async with serve() as h:
        answer = (await h.complete(prompt=["a", "bc"], n=2, echo=True, ignore_eos=True)).json()
        alone = (await h.complete(prompt="bc", echo=True, ignore_eos=True)).json()
    texts = [choice["text"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [text[0] for text in texts] == ["a", "a", "b", "b"]
    assert texts[2] == alone["choices"][0]["text"]
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 32


async def test_token_id_prompts_in_both_forms(serve: Serve) -> None:
    async with serve() as h:
        ids = h.tokenizer.encode("hello")
        text = (await h.complete(ignore_eos=True)).json()["choices"][0]["text"]
        one = (await h.complete(prompt=ids, ignore_eos=True)).json()
        two = (await h.complete(prompt=[ids, ids], ignore_eos=True)).json()
    assert [choice["text"] for choice in one["choices"]] == [text]
    assert [choice["text"] for choice in two["choices"]] == [text, text]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_string_cuts_the_text_and_frees_the_request(
    serve: Serve, stream: bool, include: bool
) -> None:
    async with serve() as h:
        asked = {"max_tokens": 200, "ignore_eos": True}
        full = (await h.complete(**asked)).json()["choices"][0]["text"]
        stop = full[20:23]
        at = full.index(stop)
        response = await h.complete(
            **asked, stop=[stop, "never this"], stream=stream, include_stop_str_in_output=include
        )
        if stream:
            chunks = [chunk["choices"][0] for chunk in events(response.text)[:-1]]
            text, last = "".join(chunk["text"] for chunk in chunks), chunks[-1]
        else:
            last = response.json()["choices"][0]
            text = last["text"]
            assert response.json()["usage"]["completion_tokens"] < 200
        while not h.all_given_back():
            await h.client.get("/health")
    assert text == full[: at + 3 if include else at]
    assert last["finish_reason"] == "stop"
    assert last["stop_reason"] == stop


async def test_a_stop_token_ends_and_is_not_text(serve: Serve) -> None:
    async with serve() as h:
        expected = h.runner.expected(h.tokenizer.encode("hello"), None, 8)
        stop = expected[4]
        length = expected.index(stop) + 1
        answer = (await h.complete(stop_token_ids=[stop], ignore_eos=True)).json()
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == stop
    assert choice["text"] == h.tokenizer.decode(expected[: length - 1])


async def test_chat_logprobs_name_every_token_and_its_alternatives(serve: Serve) -> None:
    async with serve() as h:
        answer = (await h.chat(logprobs=True, top_logprobs=3, ignore_eos=True)).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 8
    for token in content:
        assert set(token) == {"token", "logprob", "bytes", "top_logprobs"}
        assert len(token["top_logprobs"]) == 3
        assert bytes(token["bytes"]).decode("utf-8", "replace") == token["token"]


async def test_completion_logprobs_are_parallel_lists(serve: Serve) -> None:
    async with serve() as h:
        whole = (await h.complete(logprobs=2, ignore_eos=True)).json()["choices"][0]["logprobs"]
        streamed = events((await h.complete(logprobs=2, ignore_eos=True, stream=True)).text)[:-1]
    assert {len(whole[key]) for key in whole} == {8}
    for key in whole:
        parts = [chunk["choices"][0]["logprobs"][key] for chunk in streamed]
        assert [item for part in parts for item in part] == whole[key]


async def test_default_lengths_are_sixteen_and_the_rest_of_the_context(serve: Serve) -> None:
    async with serve() as h:
        asked = {"model": "base", "ignore_eos": True}
        plain = await h.client.post("/v1/completions", json=asked | {"prompt": "x"})
        messages = [{"role": "user", "content": "hi"}]
        chat = await h.client.post("/v1/chat/completions", json=asked | {"messages": messages})
    assert plain.json()["usage"]["completion_tokens"] == 16
    assert chat.json()["usage"]["total_tokens"] == 256


async def test_cached_prompt_tokens_are_reported(serve: Serve) -> None:
    async with serve() as h:
        first = (await h.complete(prompt="x" * 100)).json()["usage"]
        again = (await h.complete(prompt="x" * 100)).json()["usage"]
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert again["prompt_tokens_details"]["cached_tokens"] == 96


async def test_an_adapter_answers_under_its_name_and_in_the_header(serve: Serve) -> None:
    async with serve() as h:
        await h.upload("poet")
        digest = h.library.resolve("poet").digest
        prompt = h.tokenizer.encode("hello")
        base = await h.complete(ignore_eos=True, return_token_ids=True)
        whole = await h.complete(model="poet", ignore_eos=True, return_token_ids=True)
        pinned = await h.complete(model="poet@1", stream=True)
        assert h.library.staged == 2
        assert h.all_given_back()
        expected = h.runner.expected(prompt, digest, 8)
    assert "x-shoal-adapter" not in base.headers
    assert whole.headers["x-shoal-adapter"] == pinned.headers["x-shoal-adapter"] == "poet@1"
    assert whole.json()["model"] == "poet"
    assert events(pinned.text)[0]["model"] == "poet@1"
    assert whole.json()["choices"][0]["token_ids"] == expected
    assert base.json()["choices"][0]["token_ids"] != expected


async def test_the_openai_client_chats_streams_completes_and_lists(serve: Serve) -> None:
    async with serve(api_key=("secret",)) as h:
        transport = httpx.ASGITransport(h.app)
        async with openai.AsyncOpenAI(
            api_key="secret",
            base_url="http://shoal/v1",
            http_client=httpx.AsyncClient(transport=transport),
        ) as client:
            messages: Any = [{"role": "user", "content": "hi"}]
            whole = await client.chat.completions.create(
                model="base", messages=messages, max_tokens=12, user="me"
            )
            # What a client got back it may send again, with all its empty fields.
            again = [*messages, whole.choices[0].message.model_dump(), *messages]
            await client.chat.completions.create(model="base", messages=again, max_tokens=3)
            text = ""
            async for chunk in await client.chat.completions.create(
                model="base",
                messages=messages,
                max_tokens=12,
                stream=True,
                stream_options={"include_usage": True},
            ):
                text += "".join(choice.delta.content or "" for choice in chunk.choices)
                usage = chunk.usage
            assert text == whole.choices[0].message.content
            assert usage is not None
            assert usage.completion_tokens == whole.usage.completion_tokens
            plain = await client.completions.create(model="base", prompt="hello", max_tokens=4)
            assert plain.choices[0].finish_reason in ("length", "stop")
            assert [model.id async for model in client.models.list()] == ["base"]
            with pytest.raises(openai.NotFoundError, match="no model 'nobody'"):
                await client.completions.create(model="nobody", prompt="x")
            with pytest.raises(openai.BadRequestError, match="temperature"):
                await client.completions.create(model="base", prompt="x", temperature=-1)
