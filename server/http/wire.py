"""HTTP/1.1 on the wire: uvicorn's protocol on httptools, with limits on what is not a body.

httptools parses in C, and its protocol sends a part of an answer without a state machine in Python:
with hundreds of streams, what one part costs decides how many tokens a second leave.
"""

import asyncio
import logging
from typing import Any

import httptools
from starlette.types import Message
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

logger = logging.getLogger(__name__)

# Of a request line and headers that are not complete yet, or of what stands between or behind the
# parts of a body.
HEAD_BYTES_MAX = 64 << 10
# From a connection's or request's first byte, and from connecting, until its headers are complete.
HEAD_S = 30.0
# Requests that were sent before the one ahead of them was answered: each takes kilobytes.
AHEAD_MAX = 64


class Wire(HttpToolsProtocol):
    """One connection. A head that is too long is refused, one that is too slow is hung up on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parser = _Parser(self)
        # As uvicorn's own parser, so that what follows a last request does no harm.
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._head_bytes = 0
        self._patience: asyncio.TimerHandle | None = None
        # A request that offers another protocol, as it would be without that.
        self._plain: bytes | None = None
        # The request that is being answered: `cycle` is that which came last.
        self._running: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)
        running, self._running = self._running, None
        if running is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        self._await_head()

    def on_headers_complete(self) -> None:
        self._head_bytes = 0
        version = self.parser.get_http_version()
        # The parser takes what follows such a head for the other protocol: it gets it once more.
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version.encode())]
            lines += (b"%b: %b" % header for header in self.headers if header[0] != b"upgrade")
            self._plain = b"\r\n".join((*lines, b"", b""))
            return
        if len(self.pipeline) >= AHEAD_MAX:
            raise ValueError("too many requests ahead of their answers")  # a 400 like all others
        self._stop_waiting()
        super().on_headers_complete()
        if not self.pipeline:
            self._running = self.cycle
        if version == "1.0":
            _send_unchunked(self.cycle)
        self.headers = []  # what comes behind the body is none of the request's

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._plain is None:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.pipeline:
            self._running = self.pipeline[-1][0]
        super().on_response_complete()

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._head_bytes > HEAD_BYTES_MAX:
            self.send_400_response(f"The headers are longer than {HEAD_BYTES_MAX} bytes.")
        elif self._patience is None and not self._answering():
            # Behind an answer: the rest of a body that was not wanted, or empty lines.
            self._await_head()

    def take_plain(self) -> bytes:
        """The head to go on with in place of the one that offered another protocol."""
        plain, self._plain = self._plain, None
        assert plain is not None
        return plain

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_head(self) -> None:
        self._stop_waiting()
        self._patience = self.loop.call_later(HEAD_S, self._hang_up)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _hang_up(self) -> None:
        if self._answering():  # a request ahead of it; nor is it read on before that has ended
            self._await_head()
            return
        logger.debug("headers did not come in %.0f s from %s", HEAD_S, self.client)
        self.transport.close()


class _Parser(httptools.HttpRequestParser):
    """Nobody here speaks another protocol: who offers one is answered in this one."""

    def __init__(self, wire: Wire) -> None:
        super().__init__(wire)
        self._wire = wire

    def feed_data(self, data: Any) -> None:
        while True:
            try:
                super().feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = self._wire.take_plain() + data[upgrade.args[0] :]


def _send_unchunked(cycle: RequestResponseCycle) -> None:
    """For HTTP/1.0, which has no chunks: what has no length ends with the connection."""
    send = cycle.send
    unchunked = False

    async def unframed(message: Message) -> None:
        nonlocal unchunked
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", ())}
            unchunked = b"content-length" not in names
        if unchunked:
            cycle.chunked_encoding = False
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)  # type: ignore[arg-type]

    cycle.send = unframed  # type: ignore[method-assign,assignment]
