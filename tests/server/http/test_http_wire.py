"""What the wire refuses before a request is one, over real sockets."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from shoal.server.http import wire
from shoal.server.http.wire import HEAD_BYTES_MAX, Wire

pytestmark = pytest.mark.anyio

PATIENCE_S = 60.0


async def _echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(f"{len(await request.body())}")


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    app = Starlette(routes=[Route("/{path:path}", _echo, methods=["GET", "POST"])])
    server = uvicorn.Server(uvicorn.Config(app, http=Wire, ws="none", log_config=None))
    server.config.load()
    listener = socket.create_server(("127.0.0.1", 0))
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    reader, writer = await asyncio.open_connection(*listener.getsockname())
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
        server.should_exit = True
        await task


async def answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Status line, and the body."""
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE_S)
    (length,) = (
        int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-len")
    )
    return head.split(b"\r\n")[0], await reader.readexactly(length)


async def test_requests_one_after_the_other_on_one_connection() -> None:
    async with connected() as (reader, writer):
        for size in (0, 5, 200_000):
            writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % size)
            writer.write(b"x" * size)
            status, body = await answer(reader)
            assert status.split()[1] == b"200"
            assert int(body) == size


async def test_a_head_may_be_as_long_as_the_limit_and_no_longer() -> None:
    async with connected() as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\nx-a: %b\r\n\r\n" % (b"a" * 40_000))
        assert (await answer(reader))[0].split()[1] == b"200"
        sent = b"GET / HTTP/1.1\r\nhost: x\r\n"
        writer.write(sent)
        try:
            for number in range(2 * HEAD_BYTES_MAX // 1000):
                writer.write(b"x-%05d: %b\r\n" % (number, b"a" * 990))
                await writer.drain()
                await asyncio.sleep(0)
        except OSError:
            pass  # it has hung up already
        with suppress(OSError):
            status, body = await answer(reader)
            assert status.split()[1] == b"400"
            assert str(HEAD_BYTES_MAX).encode() in body
        with suppress(OSError):
            assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nhost"])
async def test_a_head_that_does_not_come_is_not_waited_for(
    begun: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "HEAD_S", 0.05)
    async with connected() as (reader, writer):
        writer.write(begun)
        assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""


async def test_a_body_is_not_held_to_the_time_of_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "HEAD_S", 0.2)
    async with connected() as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\nab")
        await asyncio.sleep(0.5)
        writer.write(b"cd")
        assert (await answer(reader)) == (b"HTTP/1.1 200 OK", b"4")


async def test_what_is_not_http_is_refused() -> None:
    async with connected() as (reader, writer):
        writer.write(b"\x16\x03\x01\x00\xa5\x01\x00\x00")
        assert (await answer(reader))[0].split()[1] == b"400"
