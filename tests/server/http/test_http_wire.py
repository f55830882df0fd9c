"""What the wire refuses before a request is one, over real sockets."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from shoal.server.http import wire
from shoal.server.http.wire import HEAD_BYTES_MAX, Wire

pytestmark = pytest.mark.anyio

PATIENCE_S = 60.0


async def _echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(f"{len(await request.body())}")


async def _names(request: Request) -> PlainTextResponse:
    await request.body()
    return PlainTextResponse(" ".join(name.decode() for name, _ in request.scope["headers"]))


async def _early(_: Request) -> PlainTextResponse:
    return PlainTextResponse("no", 413)


async def _stream(_: Request) -> Response:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield b"x"
            await asyncio.sleep(0.1)

    return StreamingResponse(parts())


LEFT = asyncio.Event()


async def _wait(request: Request) -> Response:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    LEFT.set()
    return Response()


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    app = Starlette(
        routes=[
            Route("/names", _names, methods=["POST"]),
            Route("/early", _early, methods=["POST"]),
            Route("/stream", _stream),
            Route("/wait", _wait),
            Route("/{path:path}", _echo, methods=["GET", "POST"]),
        ]
    )
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


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(
    ("framing", "body"),
    [
        (b"content-length: 4", b"abcd"),
        (b"transfer-encoding: chunked", b"4\r\nabcd\r\n0\r\n\r\n"),
    ],
)
async def test_who_offers_another_protocol_is_answered_in_this_one(
    framing: bytes, body: bytes, apart: bool
) -> None:
    """Java's client asks for HTTP/2 with its first request; the body was taken for that."""
    head = (
        b"POST / HTTP/1.1\r\nhost: x\r\nconnection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\n"
        b"http2-settings: AA\r\n%b\r\n\r\n" % framing
    )
    async with connected() as (reader, writer):
        for _ in range(2):
            for part in (head, body) if apart else (head + body,):
                writer.write(part)
                await asyncio.sleep(0.05)
            assert (await answer(reader)) == (b"HTTP/1.1 200 OK", b"4")


async def test_what_comes_behind_a_body_is_no_header() -> None:
    async with connected() as (reader, writer):
        writer.write(b"POST /names HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        writer.write(b"1\r\nx\r\n0\r\nauthorization: y\r\n\r\n")
        assert (await answer(reader))[1] == b"host transfer-encoding"


async def test_what_comes_behind_a_body_is_limited_like_a_head() -> None:
    async with connected() as (_, writer):
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        writer.write(b"1\r\nx\r\n0\r\n")
        sent = 0
        with suppress(OSError):
            for number in range(2000):
                writer.write(b"x-%05d: %b\r\n" % (number, b"a" * 9990))
                await writer.drain()
                sent += 10_000
                await asyncio.sleep(0.001)
        # Apart from what the sockets hold.
        assert sent < 10_000_000


@pytest.mark.parametrize("path", [b"/", b"/early"])
async def test_who_asks_nothing_more_is_hung_up_on(
    path: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte behind an answer, of its request's body or between two, kept the connection."""
    monkeypatch.setattr(wire, "HEAD_S", 0.2)
    async with connected() as (reader, writer):
        length = 0 if path == b"/" else 100
        writer.write(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (path, length))
        await answer(reader)
        writer.write(b"x" if length else b"\r\n")
        assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""


@pytest.mark.parametrize("begun", [b"G", b"GET / HTTP/1.1\r\nhost: x\r\n\r\nGET / HT"])
async def test_an_answer_is_not_cut_short_by_a_head_that_is_late(
    begun: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "HEAD_S", 0.2)
    async with connected() as (reader, writer):
        writer.write(b"GET /stream HTTP/1.1\r\nhost: x\r\n\r\n")
        await reader.readuntil(b"x\r\n")
        writer.write(begun)
        rest = await asyncio.wait_for(reader.readuntil(b"\r\n0\r\n\r\n"), PATIENCE_S)
        assert rest.count(b"x\r\n") == 4


async def test_requests_ahead_of_their_answers_are_limited() -> None:
    async with connected() as (reader, writer):
        few = 8
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * few)
        for _ in range(few):
            assert (await answer(reader)) == (b"HTTP/1.1 200 OK", b"0")
        writer.write(b"GET /stream HTTP/1.1\r\nhost: x\r\n\r\n")
        await reader.readuntil(b"x\r\n")
        with suppress(OSError):
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * 1000)
            await asyncio.wait_for(reader.readuntil(b"400 Bad Request"), PATIENCE_S)


async def test_an_old_client_gets_a_stream_without_chunks() -> None:
    async with connected() as (reader, writer):
        writer.write(b"GET /stream HTTP/1.0\r\n\r\n")
        head, body = (await asyncio.wait_for(reader.read(), PATIENCE_S)).split(b"\r\n\r\n", 1)
        assert b"transfer-encoding" not in head
        assert body == b"xxxxx"
    async with connected() as (reader, writer):
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        assert (await answer(reader)) == (b"HTTP/1.1 200 OK", b"0")


async def test_a_client_that_leaves_with_requests_ahead_is_noticed() -> None:
    LEFT.clear()
    async with connected() as (_, writer):
        writer.write(b"GET /wait HTTP/1.1\r\nhost: x\r\n\r\nGET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await asyncio.sleep(0.1)
        writer.close()
        await asyncio.wait_for(LEFT.wait(), 20)
