"""How an answer leaves: as one JSON body or as server-sent events, and only while somebody reads.

Owns the watch for the client's disconnect (whatever the work is, it is cancelled then) and the
rule for errors: before the first byte they are a status and a body, after it a ``data:`` event.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

import anyio
from fastapi.responses import Response
from pydantic_core import to_json
from starlette.types import Message, Receive, Scope, Send

from shoal.server.errors import STATUS, ShoalError
from shoal.server.http.errors import error_body, internal_body
from shoal.server.http.services import Counts

logger = logging.getLogger(__name__)

Work = Callable[[Send], Awaitable[None]]

_DONE = b"data: [DONE]\n\n"
# A client that takes nothing for so long is taken to have left: what the work holds is others'.
STALLED_S = 60.0


class WhileConnected(Response):
    """A response that does its work when it is sent, and stops when the client goes away.

    One that does not read is gone, too: an adapter stays pinned for as long as its answer is sent.
    """

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with anyio.CancelScope() as running:
            sending_s: float | None = None  # since when

            async def watch() -> None:
                there = True
                while there:
                    with anyio.move_on_after(STALLED_S):
                        there = (await receive())["type"] != "http.disconnect"
                    if sending_s is not None and time.monotonic() - sending_s >= STALLED_S:
                        there = False
                running.cancel()

            async def noted(message: Message) -> None:
                nonlocal sending_s
                sending_s = time.monotonic()
                await send(message)
                sending_s = None

            watcher = asyncio.create_task(watch())
            try:
                await self._work(noted)
            finally:
                watcher.cancel()


async def send_json(
    send: Send, content: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> None:
    """Send one JSON body with status 200."""
    body = _dumps(content)
    raw = [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": raw + _raw(headers)})
    await send({"type": "http.response.body", "body": body})


async def send_events(
    send: Send,
    chunks: AsyncGenerator[Mapping[str, Any], None],
    headers: Mapping[str, str],
    counts: Counts,
) -> None:
    """Send each chunk as an event, then ``[DONE]``.

    The response starts with the first chunk, so that what is refused before it has a status.
    """
    started = False
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                if not started:
                    await _start_events(send, headers)
                    started = True
                await _send_part(send, b"data: " + _dumps(chunk) + b"\n\n")
            last = _DONE
        except ShoalError as error:
            if not started:
                raise
            counts.error(STATUS[type(error)][0])
            last = b"data: " + _dumps(error_body(error)) + b"\n\n"
        except Exception:
            # The status is sent; without this the client would only see the connection break.
            if not started:
                raise
            counts.error(500)
            logger.exception("a stream failed after it began")
            last = b"data: " + _dumps(internal_body()) + b"\n\n"
    await send({"type": "http.response.body", "body": last, "more_body": False})


async def _start_events(send: Send, headers: Mapping[str, str]) -> None:
    raw = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),  # proxies: pass each event on at once
    ]
    await send({"type": "http.response.start", "status": 200, "headers": raw + _raw(headers)})


async def _send_part(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


def _raw(headers: Mapping[str, str] | None) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in (headers or {}).items()]


def _dumps(content: Mapping[str, Any]) -> bytes:
    return to_json(content, inf_nan_mode="null")
