"""The request field ``adapters``: its rules, what it means, and what the answer says of it."""

import json
from typing import Any

import pytest
from tests.server.http.conftest import Harness, Serve

from shoal.adapters.blending import PARTS_MAX

pytestmark = pytest.mark.anyio

HEADER = "x-shoal-adapter"


async def three(h: Harness) -> None:
    """``a`` at version 1, ``b`` at version 2, and ``twin`` with what ``a`` has."""
    for name, content in (("a", b"1"), ("b", b"2"), ("b", b"3"), ("twin", b"1")):
        assert (await h.upload(name, content)).status_code == 201


def part(name: str, weight: object) -> dict[str, object]:
    return {"name": name, "weight": weight}


async def test_a_blend_is_staged_once_and_named_in_the_header(serve: Serve) -> None:
    async with serve() as h:
        await three(h)
        asked = [part("a", 0.7), part("b@1", -0.3), part("b", 2)]
        for response in (await h.chat(adapters=asked), await h.complete(adapters=asked)):
            assert response.status_code == 200
            assert response.headers[HEADER] == "a@1*0.7,b@1*-0.3,b@2*2"
            assert response.json()["model"] == "base"
        assert len({blend.digest for blend in h.library.blends}) == 1
        parts = h.library.blends[0].parts
        assert {(v.name, v.version, w) for v, w in parts} == {
            ("a", 1, 0.7),
            ("b", 1, -0.3),
            ("b", 2, 2.0),
        }
        assert h.all_given_back()


async def test_several_choices_share_one_blend(serve: Serve) -> None:
    async with serve() as h:
        await three(h)
        response = await h.chat(adapters=[part("a", 0.5), part("b", 0.5)], n=3)
        assert len(response.json()["choices"]) == 3
        assert h.library.staged == 1
        assert h.all_given_back()


async def test_a_stream_has_the_header_too(serve: Serve) -> None:
    async with serve() as h:
        await three(h)
        body = {
            "model": "base",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 4,
            "stream": True,
            "adapters": [part("b", 1), part("a", 1)],
        }
        async with h.client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.headers[HEADER] == "b@2*1,a@1*1"
            lines = [line async for line in response.aiter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[0].removeprefix("data: "))["model"] == "base"
        assert h.all_given_back()


async def test_a_blend_answers_differently_than_its_parts(serve: Serve) -> None:
    async with serve() as h:
        await three(h)
        one, other, both, turned = [
            (await h.chat(**fields)).json()["choices"][0]["message"]["content"]
            for fields in (
                {"model": "a"},
                {"model": "b"},
                {"adapters": [part("a", 0.5), part("b", 0.5)]},
                {"adapters": [part("b", 0.5), part("a", 0.5)]},
            )
        ]
        assert len({one, other, both}) == 3
        assert both == turned


@pytest.mark.parametrize(
    "asked",
    [
        [part("b@1", 1)],
        [part("b@1", 1.0), part("a", 0)],
        [part("b@1", 0.5), part("b@1", 0.5)],
        [part("b@1", 1), part("a", 0.25), part("twin", -0.25)],
    ],
    ids=["one", "zero", "halves", "cancelled"],
)
async def test_one_adapter_with_weight_1_is_that_adapter(serve: Serve, asked: Any) -> None:
    async with serve() as h:
        await three(h)
        blend, own = await h.chat(adapters=asked), await h.chat(model="b@1")
        assert blend.headers[HEADER] == own.headers[HEADER] == "b@1"
        assert blend.json()["choices"] == own.json()["choices"]
        assert h.library.blends == []


async def test_a_sum_of_nothing_is_the_base(serve: Serve) -> None:
    async with serve() as h:
        await three(h)
        for asked in ([part("a", 0)], [part("a", 3), part("twin", -3)], [part("b", -0.0)]):
            blend, base = await h.chat(adapters=asked), await h.chat()
            assert HEADER not in blend.headers
            assert blend.json()["choices"] == base.json()["choices"]
        assert h.library.staged == 0


@pytest.mark.parametrize(
    ("asked", "param", "told"),
    [
        ([], "adapters", "at least 1"),
        ([part("a", 1)] * (PARTS_MAX + 1), "adapters", f"at most {PARTS_MAX}"),
        ([part("a", 100.5)], "adapters[0].weight", "less than or equal to 100"),
        ([part("a", 1), part("b", -101)], "adapters[1].weight", "greater than or equal to -100"),
        ([part("a", "1")], "adapters[0].weight", "valid number"),
        ([part("a", True)], "adapters[0].weight", "valid number"),
        ([part("a", None)], "adapters[0].weight", "valid number"),
        ([{"name": "a"}], "adapters[0].weight", "required"),
        ([{"weight": 1}], "adapters[0].name", "required"),
        ([part("", 1)], "adapters[0].name", "at least 1 character"),
        ([part("a" * 257, 1)], "adapters[0].name", "at most 256"),
        ([{"name": "a", "weight": 1, "scale": 2}], "adapters[0].scale", "unknown field"),
        (["a"], "adapters[0]", "dictionary"),
        ({"a": 1}, "adapters", "list"),
    ],
)
async def test_what_breaks_a_rule_is_named(serve: Serve, asked: Any, param: str, told: str) -> None:
    async with serve() as h:
        await three(h)
        for response in (await h.chat(adapters=asked), await h.complete(adapters=asked)):
            error = response.json()["error"]
            assert response.status_code == 400, error
            assert (error["param"], told in error["message"]) == (param, True), error


@pytest.mark.parametrize("weight", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400])
async def test_weights_are_finite(serve: Serve, weight: str) -> None:
    async with serve() as h:
        await three(h)
        asked = f'[{{"name": "a", "weight": {weight}}}]'
        body = f'{{"model": "base", "prompt": "x", "adapters": {asked}}}'
        headers = {"content-type": "application/json"}
        response = await h.client.post("/v1/completions", content=body, headers=headers)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "adapters[0].weight"


@pytest.mark.parametrize("name", ["c", "b@3", "b@x", "A", "../a", "base", "a\u2028b"])
async def test_a_missing_adapter_is_named_and_nothing_is_staged(serve: Serve, name: str) -> None:
    async with serve() as h:
        await three(h)
        response = await h.chat(adapters=[part("a", 1), part(name, 0)])
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (404, "adapters[1].name")
        assert repr(name) in error["message"]
        assert h.library.staged == 0


@pytest.mark.parametrize("model", ["a", "c"])
async def test_a_blend_is_on_the_base(serve: Serve, model: str) -> None:
    async with serve() as h:
        await three(h)
        response = await h.chat(model=model, adapters=[part("a", 1)])
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "model")
        assert "must be the base" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_sum_that_cannot_be_served_is_refused(serve: Serve, stream: bool) -> None:
    async with serve() as h:
        await three(h)
        assert (await h.upload("refused", b"4")).status_code == 201
        response = await h.chat(adapters=[part("a", 1), part("refused", 1)], stream=stream)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (422, "unusable_adapter")
        assert (error["param"], "'refused'" in error["message"]) == ("adapters", True)
        assert h.all_given_back()


async def test_a_host_tier_that_is_full_says_come_back(serve: Serve) -> None:
    async with serve() as h:
        await three(h)
        assert (await h.upload("crowded", b"4")).status_code == 201
        response = await h.chat(adapters=[part("a", 1), part("crowded", 1)])
        assert response.status_code == 429
        assert "a@1*1,crowded@1*1" in response.json()["error"]["message"]
        assert "retry-after" in response.headers


async def test_versions_are_those_of_the_arrival(serve: Serve) -> None:
    async with serve() as h:
        await three(h)
        asked = [part("a", 0.5), part("b", 0.5)]
        before = (await h.chat(adapters=asked)).json()["choices"]
        assert (await h.upload("b", b"5")).status_code == 201
        moved = await h.chat(adapters=asked)
        assert moved.headers[HEADER] == "a@1*0.5,b@3*0.5"
        assert moved.json()["choices"] != before
        again = await h.chat(adapters=[part("a", 0.5), part("b@2", 0.5)])
        assert again.json()["choices"] == before


async def test_blends_are_one_series_of_the_metrics(serve: Serve) -> None:
    async with serve() as h:
        await three(h)
        for weight in (0.1, 0.2, 0.3):
            await h.chat(adapters=[part("a", weight), part("b", 1)])
        text = (await h.client.get("/metrics")).text
        lines = [x for x in text.splitlines() if x.startswith("shoal:adapter_requests_total{")]
        assert [('adapter="_blend"' in x, x.split()[-1]) for x in lines] == [(True, "3.0")]
