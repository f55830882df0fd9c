"""What is wrong with a request is said in OpenAI's body, with the right status and field."""

import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from shoal.adapters.errors import AdapterQuotaExceeded

pytestmark = pytest.mark.anyio

Serve = Callable[..., Any]
JSON = {"content-type": "application/json"}
USER = [{"role": "user", "content": "hi"}]


def problem(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    error: dict[str, Any] = body["error"]
    return error


COMMON: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 10_000}, "max_tokens"),
    ({"min_tokens": 9}, "min_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 3}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"seed": 2**63}, "seed"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"stop": ""}, "stop"),
    ({"stop": 7}, "stop"),
    ({"stop": ["x", 7]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": "x" * 257}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [99_999]}, "stop_token_ids"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 1e-300}, "repetition_penalty"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": {"five": 1}}, "logit_bias"),
    ({"logit_bias": {"1_0": 1}}, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"logit_bias": {str(i): "x" for i in range(1025)}}, "logit_bias"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"best_of": 3}, "best_of"),
    ({"no_such_field": 1}, "no_such_field"),
    ({"model": ""}, "model"),
    ({"model": 7}, "model"),
]
CHAT: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "user", "content": None}]}, "messages"),
    ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": "x", "mood": "y"}]}, "messages[0].mood"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content",
    ),
    ({"messages": [{"role": "user", "content": "x" * 300}]}, "messages"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"prompt": "x"}, "prompt"),
]
COMPLETION: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": 7}, "prompt"),
    ({"prompt": ["x", 7]}, "prompt"),
    ({"prompt": [1, True]}, "prompt"),
    ({"prompt": [[1], "x"]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [99_999]}, "prompt"),
    ({"prompt": "x" * 256}, "prompt"),
    ({"prompt": [5] * 256}, "prompt"),
    ({"prompt": ["x"] * 129}, "prompt"),
    ({"prompt": ["x"] * 100, "n": 2}, "n"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": 1, "echo": True}, "echo"),
    ({"suffix": "end"}, "suffix"),
    ({"messages": USER}, "messages"),
]


async def test_every_broken_field_is_a_400_that_names_it_and_changes_nothing(serve: Serve) -> None:
    async with serve() as h:
        cases = [(h.chat, *case) for case in COMMON + CHAT]
        cases += [(h.complete, *case) for case in COMMON + COMPLETION]
        for send, fields, param in cases:
            response = await send(**fields)
            assert response.status_code == 400, (fields, response.text)
            error = problem(response)
            assert error["param"] == param, (fields, error)
            assert error["type"] == "invalid_request_error"
            assert param.split("[")[0].split(".")[0] in error["message"], (fields, error)
        assert h.runner.steps == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": "base", "prompt": "x"',
        b"[1]",
        b"7",
        b'"text"',
        b"null",
        b"\xff\xfe",
        b'{"model": "base", "prompt": "x", "temperature": NaN}',
        b'{"model": "base", "prompt": "\\ud800"}',
        b'{"model": "base", "prompt": "x", "\\ud800": 1}',
        b"1" * 5000,
        b"[" * 100_000,
        b'{"model": "base", "prompt": "x", "max_tokens": 1e400}',
    ],
)
async def test_a_body_that_is_no_json_object_is_a_400(serve: Serve, body: bytes) -> None:
    async with serve() as h:
        response = await h.client.post(
            "/v1/completions", content=body, headers={"content-type": "application/json"}
        )
        assert response.status_code == 400, response.text
        problem(response)


async def test_a_body_of_another_type_is_a_400_that_says_so(serve: Serve) -> None:
    async with serve() as h:
        response = await h.client.post("/v1/completions", content=b'{"model":"base","prompt":"x"}')
    assert response.status_code == 400
    assert "application/json" in problem(response)["message"]


@pytest.mark.parametrize("model", ["nobody", "base@1", "Base", "../x", "poet@9", "poet@", "é"])
async def test_an_unknown_model_is_a_404(serve: Serve, model: str) -> None:
    async with serve() as h:
        await h.upload("poet")
        for response in (await h.chat(model=model), await h.complete(model=model)):
            assert response.status_code == 404
            assert problem(response)["code"] == "model_not_found"
            assert problem(response)["param"] == "model"


async def test_a_prompt_too_long_has_openais_code(serve: Serve) -> None:
    async with serve() as h:
        for fields in ({"prompt": "x" * 300}, {"prompt": "x" * 250, "max_tokens": 7}):
            response = await h.complete(**fields)
            assert response.status_code == 400
            assert problem(response)["code"] == "context_length_exceeded"
        assert (await h.complete(prompt="x" * 250, max_tokens=6)).status_code == 200


async def test_what_clients_send_and_changes_nothing_is_taken(serve: Serve) -> None:
    harmless = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "tools": None,
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "n": None,
        "seed": None,
        "stop": None,
        "logit_bias": None,
        "best_of": 1,
        "top_k": -1,
    }
    async with serve() as h:
        assert (await h.chat(**harmless)).status_code == 200
        assert (await h.complete(**harmless)).status_code == 200


async def test_numbers_that_ask_for_nothing_are_taken_however_large(serve: Serve) -> None:
    async with serve() as h:
        for fields in (
            {"top_k": 10**30},
            {"top_k": -1},
            {"temperature": 1e-300},
            {"top_p": 1e-300},
        ):
            assert (await h.complete(**fields)).status_code == 200, fields


async def test_a_message_repeats_neither_megabytes_nor_every_mistake(serve: Serve) -> None:
    async with serve() as h:
        for fields in (
            {"prompt": [["x"]] * 50_000},
            {f"field{i}": i for i in range(20_000)},
            {"prompt": {"x" * 100_000: 1}},
        ):
            started = time.perf_counter()
            response = await h.complete(**fields)
            assert response.status_code == 400
            assert len(response.content) < 500
            assert time.perf_counter() - started < 10
        started = time.perf_counter()
        response = await h.client.post("/detokenize", json={"tokens": ["x"] * 500_000})
        assert problem(response)["param"] == "tokens[0]"
        assert time.perf_counter() - started < 10


async def test_text_parts_and_a_developer_message(serve: Serve) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    async with serve() as h:
        plain = await h.chat(return_token_ids=True)
        split = await h.chat(messages=[{"role": "user", "content": parts}], return_token_ids=True)
        said = {"messages": [{"role": "developer", "content": "x"}, *USER]}
        ids = (await h.chat(**said, return_token_ids=True)).json()["prompt_token_ids"]
    assert plain.json()["prompt_token_ids"] == split.json()["prompt_token_ids"]
    assert h.tokenizer.decode(ids).startswith("<|system|>x")


async def test_unknown_routes_and_methods(serve: Serve) -> None:
    async with serve() as h:
        missing = await h.client.get("/v1/nothing")
        wrong = await h.client.get("/v1/completions")
    assert (missing.status_code, problem(missing)["code"]) == (404, "not_found")
    assert (wrong.status_code, problem(wrong)["code"]) == (405, "method_not_allowed")
    assert "POST" in wrong.headers["allow"]


async def test_a_bug_of_ours_is_a_500_without_details(serve: Serve) -> None:
    async with serve() as h:

        def broken(model: str) -> object:
            raise ZeroDivisionError("secret detail")

        h.library.resolve = broken
        response = await h.complete(model="poet")
    assert response.status_code == 500
    assert problem(response)["message"] == "internal error"
    assert "secret" not in response.text


async def test_a_failed_step_is_a_500_and_the_next_request_works(serve: Serve) -> None:
    async with serve() as h:
        h.gate.error = RuntimeError("device on fire")
        response = await h.complete()
        h.gate.error = None
        again = await h.complete()
        assert h.all_given_back()
    assert response.status_code == 500
    assert problem(response)["code"] == "engine_failure"
    assert again.status_code == 200


async def test_keys_guard_everything_but_health_version_and_metrics(serve: Serve) -> None:
    async with serve(api_key=("one", "two")) as h:
        for path in ("/health", "/version", "/metrics"):
            assert (await h.client.get(path)).status_code == 200
        for method, path in (
            ("GET", "/v1/models"),
            ("GET", "/v1/nothing"),
            ("GET", "/openapi.json"),
            ("POST", "/v1/chat/completions"),
            ("POST", "/v1/adapters"),
            ("POST", "/tokenize"),
            ("POST", "/detokenize"),
        ):
            for header in (None, "Bearer three", "Bearer ", "Bearer", "one", "Basic one"):
                headers = {"authorization": header} if header else {}
                response = await h.client.request(method, path, headers=headers)
                assert response.status_code == 401, (path, header)
                assert problem(response)["code"] == "invalid_api_key"
        for key in ("one", "two"):
            headers = {"authorization": f"Bearer {key}"}
            assert (await h.client.get("/v1/models", headers=headers)).status_code == 200


async def test_a_body_over_the_limit_is_a_413_whatever_its_length_header_says(
    serve: Serve,
) -> None:
    async def pieces() -> Any:
        for _ in range(20):
            yield b" " * 100

    async with serve(max_body_bytes=1000) as h:
        headers = {"content-type": "application/json"}
        declared = await h.client.post("/v1/completions", content=b" " * 2000, headers=headers)
        counted = await h.client.post("/v1/completions", content=pieces(), headers=headers)
        lying = await h.client.post(
            "/v1/completions", content=pieces(), headers=headers | {"content-length": "10"}
        )
        fine = await h.complete()
    for response in (declared, counted, lying):
        assert response.status_code == 413
        assert problem(response)["code"] == "body_too_large"
    assert fine.status_code == 200


async def test_tokenize_and_detokenize_are_inverse_and_checked(serve: Serve) -> None:
    async with serve() as h:
        post = h.client.post
        tokens = (
            await post("/tokenize", json={"prompt": "héllo", "return_token_strs": True})
        ).json()
        back = (await post("/detokenize", json={"tokens": tokens["tokens"]})).json()
        chat = (await post("/tokenize", json={"messages": USER, "model": "base"})).json()
        errors = [
            await post("/tokenize", json={}),
            await post("/tokenize", json={"prompt": "x", "messages": USER}),
            await post("/tokenize", content=b'{"prompt": "\\ud800"}', headers=JSON),
            await post("/detokenize", json={"tokens": [99_999]}),
            await post("/detokenize", json={"tokens": "x"}),
        ]
        unknown = await post("/tokenize", json={"prompt": "x", "model": "nobody"})
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"]) == 6
    assert tokens["max_model_len"] == 256
    assert back == {"prompt": "héllo"}
    assert h.tokenizer.decode(chat["tokens"]) == "<|user|>hi\n<|assistant|>"
    assert [response.status_code for response in errors] == [400] * 5
    assert unknown.status_code == 404


async def test_an_upload_there_is_no_room_for_is_a_403_that_says_how_much_there_is(
    serve: Serve,
) -> None:
    async with serve() as h:

        def full(*_: object, **__: object) -> object:
            raise AdapterQuotaExceeded("bytes", allowed=1000, used=900, needed=200)

        h.library.upload = full
        response = await h.upload("poet")
    assert response.status_code == 403
    assert "retry-after" not in response.headers
    error = problem(response)
    assert (error["type"], error["code"]) == ("permission_error", "quota_exceeded")
    for said in ("limit is 1000 bytes", "900 are in use", "200 more"):
        assert said in error["message"]
