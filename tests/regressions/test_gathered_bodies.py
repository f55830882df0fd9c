"""A body that came in pieces of a byte or two was kept as so many objects of 35 bytes."""

import tracemalloc

import pytest
from starlette.requests import Request
from starlette.types import Message

from shoal.server.errors import InvalidRequest
from shoal.server.http.uploads import received

pytestmark = pytest.mark.anyio

PIECES = 100_000


async def test_what_is_gathered_takes_about_its_bytes() -> None:
    sent = 0
    most = 0

    async def receive() -> Message:
        nonlocal sent, most
        sent += 1
        if sent % 25_000 == 0:
            most = max(most, tracemalloc.get_traced_memory()[0])
        if sent > PIECES:
            return {"type": "http.disconnect"}
        return {
            "type": "http.request",
            "body": (sent % 65_536).to_bytes(2, "big"),
            "more_body": True,
        }

    headers = [(b"content-type", b"multipart/form-data; boundary=x")]
    request = Request({"type": "http", "method": "POST", "headers": headers}, receive)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest):
            async with received(request, max_bytes=1 << 30):
                pass
    finally:
        tracemalloc.stop()
    assert 2 * PIECES < most < 10 * PIECES
