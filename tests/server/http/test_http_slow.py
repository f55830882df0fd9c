"""Clients that send or read hardly anything: what they hold is given back, and it is bounded."""

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from tests.server.http.conftest import Serve

from shoal.server.errors import BodyTooSlow, Overloaded
from shoal.server.http import limits, streaming
from shoal.server.http.limits import BODY_RATE, PATIENCE_S, Held, InTime

pytestmark = pytest.mark.anyio

FORM = {"Content-Type": "multipart/form-data; boundary=b"}


async def stalled(begin: bytes) -> AsyncIterator[bytes]:
    yield begin
    await anyio.sleep_forever()


@pytest.mark.parametrize(
    ("path", "headers", "begin"),
    [
        ("/v1/adapters", FORM, b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\npo'),
        ("/v1/completions", {"Content-Type": "application/json"}, b'{"model": "ba'),
    ],
)
async def test_a_body_that_stops_coming_is_a_408(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, path: str, headers: dict[str, str], begin: bytes
) -> None:
    monkeypatch.setattr(limits, "PATIENCE_S", 0.05)
    async with serve() as h:
        with anyio.fail_after(10):
            response = await h.client.post(path, content=stalled(begin), headers=headers)
        assert response.status_code == 408
        assert response.headers["connection"] == "close"
        assert response.json()["error"]["code"] == "body_too_slow"
        assert h.services.uploads.under_way == 0
        assert h.all_given_back()


async def test_a_body_may_come_at_the_least_rate_and_no_slower() -> None:
    now_s = 0.0

    def in_time(bytes_each: int) -> InTime:
        async def receive() -> Any:
            nonlocal now_s
            now_s += 1.0
            return {"type": "http.request", "body": b"x" * bytes_each, "more_body": True}

        return InTime(receive, lambda: now_s)

    slow = in_time(BODY_RATE)
    for _ in range(1000):
        await slow()
    slower = in_time(BODY_RATE // 2)
    for _ in range(int(2 * PATIENCE_S)):
        await slower()
    with pytest.raises(BodyTooSlow):
        await slower()
    burst = in_time(100 * BODY_RATE)  # earns nothing for later
    await burst()
    assert burst._left_s <= PATIENCE_S


async def test_bodies_are_held_within_a_bound_of_which_each_owner_has_half() -> None:
    held = Held(100)
    held.take("ann", 50)
    with pytest.raises(Overloaded):
        held.take("ann", 1)
    held.take("bob", 40)
    held.take("", 10)
    with pytest.raises(Overloaded):
        held.take("bob", 1)
    held.give_back("ann", 50)
    held.take("", 50)
    for owner, count in (("bob", 40), ("", 60)):
        held.give_back(owner, count)
    assert held.total == 0
    held.take("", 100)  # where there are no tenants


async def test_a_body_is_held_until_its_request_ends(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BODIES_MAX", 1)
    filled: dict[str, Any] = {"metadata": {"x": "y" * 600}}
    async with serve(max_body_bytes=1000) as h:
        statuses: list[int] = []

        async def run() -> None:
            statuses.append((await h.complete(**filled)).status_code)

        h.gate.close()
        async with anyio.create_task_group() as group:
            group.start_soon(run)
            while not h.services.engine.stats().waiting + h.services.engine.stats().running:
                await anyio.sleep(0.001)
            refused = await h.complete(**filled)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            h.gate.open()
        assert statuses == [200]
        for _ in range(2):
            assert (await h.complete(**filled)).status_code == 200
            assert (await h.complete(**filled, model=5)).status_code == 400


async def test_a_client_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "STALLED_S", 0.05)
    ended = anyio.Event()

    async def work(send: Any) -> None:
        try:
            await send({"type": "http.response.body", "body": b"x" * 5, "more_body": True})
        finally:
            ended.set()

    async def receive() -> Any:
        await anyio.sleep_forever()

    async def send(message: Any) -> None:
        await anyio.sleep_forever()

    with anyio.fail_after(10):
        await streaming.WhileConnected(work)({"type": "http"}, receive, send)
    assert ended.is_set()


async def test_a_client_that_reads_slowly_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "STALLED_S", 0.3)
    sent = 0

    async def work(send: Any) -> None:
        for _ in range(10):
            await send({})
            await anyio.sleep(0.1)  # the model's part does not count

    async def receive() -> Any:
        await anyio.sleep_forever()

    async def send(message: Any) -> None:
        nonlocal sent
        sent += 1

    await streaming.WhileConnected(work)({"type": "http"}, receive, send)
    assert sent == 10
