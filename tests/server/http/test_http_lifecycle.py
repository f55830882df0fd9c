"""Clients that leave, queues that fill, and the end of the process: nothing stays behind."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from shoal.server.http import uploads

pytestmark = pytest.mark.anyio

Serve = Callable[..., Any]

LONG = {"model": "poet", "max_tokens": 200, "ignore_eos": True}


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(30):
        while not condition():
            await anyio.sleep(0.001)


class Client:
    """Speaks ASGI by hand, so that it can leave at any moment."""

    def __init__(self, body: dict[str, Any]) -> None:
        self._body = json.dumps(body).encode()
        self._sent = False
        self._left = anyio.Event()
        self.messages: list[Any] = []
        self.content_type = b"application/json"

    def leave(self) -> None:
        self._left.set()

    async def receive(self) -> Any:
        if not self._sent:
            self._sent = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.messages.append(message)

    async def ask(self, app: Any, path: str = "/v1/completions") -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", self.content_type), (b"host", b"shoal")],
            "server": ("shoal", 80),
            "client": ("client", 1),
        }
        with anyio.fail_after(30):
            await app(scope, self.receive, self.send)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_frees_everything_within_a_step(
    serve: Serve, stream: bool, n: int
) -> None:
    async with serve() as h:
        await h.upload("poet")
        h.gate.delay_s = 0.01
        client = Client({**LONG, "prompt": "hello", "stream": stream, "n": n})
        async with anyio.create_task_group() as group:
            group.start_soon(client.ask, h.app)
            await until(lambda: h.services.engine.stats().generation_tokens_total >= 3 * n)
            client.leave()
        steps = h.runner.steps
        await until(h.all_given_back)
        assert h.runner.steps <= steps + 2
        assert h.library.staged == 1
        assert h.services.engine.stats().generation_tokens_total < 100 * n
        assert b"[DONE]" not in b"".join(m.get("body", b"") for m in client.messages)
        assert (await h.complete()).status_code == 200


async def test_a_client_that_leaves_while_it_waits_never_runs(serve: Serve) -> None:
    async with serve() as h:
        await h.upload("poet")
        h.gate.close()
        first, second = (Client({**LONG, "prompt": text}) for text in "ab")
        async with anyio.create_task_group() as group:
            group.start_soon(first.ask, h.app)
            group.start_soon(second.ask, h.app)
            await until(lambda: h.library.staged == 2)
            first.leave()
            second.leave()
            await until(lambda: not any(h.library.pins.values()))
            h.gate.open()
        await until(h.all_given_back)
        assert first.messages == second.messages == []


async def test_a_client_that_leaves_during_staging_leaves_no_pin(serve: Serve) -> None:
    async with serve() as h:
        await h.upload("poet")
        stage, may_go = h.library.stage, threading.Event()
        began: list[None] = []

        def slow(info: Any) -> Any:
            began.append(None)
            may_go.wait(30)
            return stage(info)

        h.library.stage = slow
        client = Client({**LONG, "prompt": "x"})
        async with anyio.create_task_group() as group:
            group.start_soon(client.ask, h.app)
            await until(lambda: bool(began))
            client.leave()
            await anyio.sleep(0.01)
            may_go.set()
        await until(h.all_given_back)
        assert h.library.staged == 1
        assert h.runner.steps == 0


async def test_slow_staging_is_in_nobody_elses_way(serve: Serve) -> None:
    async with serve() as h:
        await h.upload("poet")
        stage, may_go = h.library.stage, threading.Event()
        began: list[None] = []

        def slow(info: Any) -> Any:
            began.append(None)
            may_go.wait(30)
            return stage(info)

        h.library.stage = slow
        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(Client({**LONG, "prompt": "x", "max_tokens": 1}).ask, h.app)
            await until(lambda: len(began) >= 8)
            with anyio.fail_after(20):
                assert (await h.client.get("/v1/adapters/poet")).status_code == 200
                assert (await h.upload("other", b"else")).status_code == 201
                assert (await h.complete()).status_code == 200
            may_go.set()
        await until(h.all_given_back)


async def test_a_client_that_leaves_during_an_upload_leaves_no_file(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    begun = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nbytes'
    begun += bytes(uploads.GATHER_BYTES)  # enough to be written
    messages = [{"type": "http.request", "body": begun, "more_body": True}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        assert list(tmp_path.glob("shoal-uploads-*/upload-*/part-0"))
        return {"type": "http.disconnect"}

    async with serve() as h:
        client = Client({})
        client.receive = receive
        client.content_type = b"multipart/form-data; boundary=B"
        await client.ask(h.app, "/v1/adapters")
        assert list(tmp_path.glob("shoal-uploads-*/upload-*")) == []
        assert h.library.count() == 0
        assert h.all_given_back()


async def test_a_cancelled_task_leaves_no_pin_either(serve: Serve) -> None:
    async with serve() as h:
        await h.upload("poet")
        h.gate.delay_s = 0.005
        with anyio.move_on_after(0.05):
            await h.complete(**LONG)
        await until(h.all_given_back)


async def test_a_failure_after_the_stream_began_is_an_event_and_the_end(serve: Serve) -> None:
    async with serve() as h:
        await h.upload("poet")
        h.gate.delay_s = 0.005

        async def fail() -> None:
            await until(lambda: h.services.engine.stats().generation_tokens_total >= 3)
            h.gate.error = RuntimeError("device on fire")

        async with anyio.create_task_group() as group:
            group.start_soon(fail)
            response = await h.complete(**LONG, stream=True)
        assert h.all_given_back()
    assert response.status_code == 200
    *_, last = [part for part in response.text.split("\n\n") if part]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_failure"


async def test_a_full_queue_is_a_429_before_any_byte_of_a_stream(serve: Serve) -> None:
    async with serve(max_waiting=2) as h:
        h.gate.close()
        answers: list[httpx.Response] = []

        async def ask() -> None:
            answers.append(await h.complete(stream=True))

        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(ask)
            await until(lambda: len(answers) >= 4)
            h.gate.open()
        codes = {answer.status_code for answer in answers}
        refused = [answer for answer in answers if answer.status_code == 429]
        assert h.all_given_back()
    assert codes == {200, 429}
    for answer in refused:
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "overloaded"


async def test_a_wait_beyond_the_limit_is_a_429_that_says_when(serve: Serve) -> None:
    async with serve(max_waiting_per_tenant=1) as h:
        h.gate.close()
        answers: list[httpx.Response] = []

        async def ask() -> None:
            answers.append(await h.complete())

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(ask)
            await until(lambda: len(answers) >= 1)
            h.gate.open()
        refused = [answer for answer in answers if answer.status_code == 429]
        assert h.all_given_back()
    assert refused
    after_s = refused[0].headers["retry-after"]
    assert f"try again in {after_s} s" in refused[0].json()["error"]["message"]


async def test_a_deadline_ends_an_answer_with_what_it_has(serve: Serve) -> None:
    async with serve() as h:
        h.gate.delay_s = 0.02
        answer = await h.complete(max_tokens=200, ignore_eos=True, deadline_ms=300)
        streamed = await h.complete(max_tokens=200, ignore_eos=True, deadline_ms=300, stream=True)
        await until(h.all_given_back)
    (choice,) = answer.json()["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "deadline")
    assert 1 <= answer.json()["usage"]["completion_tokens"] < 100
    *_, last, done = [part for part in streamed.text.split("\n\n") if part]
    assert done == "data: [DONE]"
    (choice,) = json.loads(last.removeprefix("data: "))["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "deadline")
    assert b'finished_reason="deadline"' in h.services.metrics.render()


async def test_a_deadline_that_passes_before_the_first_token_is_a_504(serve: Serve) -> None:
    answers: list[httpx.Response] = []
    async with serve() as h:
        h.gate.close()

        async def late() -> None:
            answers.append(await h.complete(deadline_ms=1, stream=True))

        async with anyio.create_task_group() as group:
            group.start_soon(h.complete)  # its step is under way when the other one comes
            await until(lambda: h.gate.steps == 1)
            group.start_soon(late)
            await anyio.sleep(0.1)
            h.gate.open()
        await until(h.all_given_back)
    (answer,) = answers
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert answer.json()["error"]["param"] == "deadline_ms"


@pytest.mark.parametrize("deadline_ms", [0, -5, 1.5, "10", 86_400_001])
async def test_a_deadline_is_a_whole_number_of_milliseconds(
    serve: Serve, deadline_ms: object
) -> None:
    async with serve() as h:
        answer = await h.complete(deadline_ms=deadline_ms)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "deadline_ms"


async def test_draining_lets_what_runs_end_and_refuses_what_is_new(serve: Serve) -> None:
    async with serve() as h:
        h.gate.delay_s = 0.002
        running: list[httpx.Response] = []
        drained: list[bool] = []

        async def run() -> None:
            running.append(await h.complete(max_tokens=50, ignore_eos=True))

        async def drain() -> None:
            drained.append(await h.services.drain(5))

        async with anyio.create_task_group() as group:
            group.start_soon(run)
            await until(lambda: h.services.engine.stats().running == 1)
            group.start_soon(drain)
            await until(lambda: h.services.draining)
            refused = await h.complete()
            health = await h.client.get("/health")
            metrics = await h.client.get("/metrics")
        assert drained == [True]
        assert running[0].json()["usage"]["completion_tokens"] == 50
        assert refused.status_code == health.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert "retry-after" in refused.headers
        assert metrics.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_what_outlasts_the_drain_is_aborted_with_an_error(serve: Serve, stream: bool) -> None:
    async with serve() as h:
        h.gate.delay_s = 0.02
        answers: list[httpx.Response] = []

        async def run() -> None:
            answers.append(await h.complete(max_tokens=200, ignore_eos=True, stream=stream))

        async with anyio.create_task_group() as group:
            group.start_soon(run)
            await until(lambda: h.services.engine.stats().generation_tokens_total >= 2)
            assert await h.services.drain(0.05) is False
        assert h.all_given_back()
    if stream:
        last = [part for part in answers[0].text.split("\n\n") if part][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "draining"
    else:
        assert answers[0].status_code == 503


async def test_health_says_when_the_engine_is_dead(serve: Serve) -> None:
    async with serve() as h:
        assert (await h.client.get("/health")).status_code == 200
        await h.services.engine.stop()
        assert (await h.client.get("/health")).status_code == 503
        assert (await h.complete()).status_code == 503


async def test_sixty_four_streams_with_their_own_adapters_all_end(serve: Serve) -> None:
    async with serve() as h:
        for index in range(64):
            await h.upload(f"a{index}", f"content {index}".encode())
        prompt = h.tokenizer.encode("hello")
        answers: dict[int, list[int]] = {}

        async def run(index: int) -> None:
            response = await h.complete(
                model=f"a{index}", ignore_eos=True, return_token_ids=True, stream=True
            )
            parts = [p.removeprefix("data: ") for p in response.text.split("\n\n") if p][:-1]
            answers[index] = [
                i for p in parts for c in json.loads(p)["choices"] for i in c["token_ids"]
            ]

        async with anyio.create_task_group() as group:
            for index in range(64):
                group.start_soon(run, index)
        assert h.all_given_back()
        for index, ids in answers.items():
            digest = h.library.resolve(f"a{index}").digest
            assert ids == h.runner.expected(prompt, digest, 8)
