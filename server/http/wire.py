"""HTTP/1.1 on the wire: uvicorn's protocol on httptools, with limits on what comes before a body.

httptools parses in C, and what it costs to send a part of an answer is a third of what the parser
in Python takes: with hundreds of streams that is what decides how many tokens a second leave.
"""

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

logger = logging.getLogger(__name__)

# Of a request line and headers that are not complete yet.
HEAD_BYTES_MAX = 64 << 10
# From a connection's or request's first byte, and from connecting, until its headers are complete.
HEAD_S = 30.0


class Wire(HttpToolsProtocol):
    """One connection. A head that is too long is refused, one that is too slow is hung up on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes: int | None = 0  # None behind a head
        self._patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        self._await_head()

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        self._stop_waiting()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        if self._head_bytes is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes is not None and self._head_bytes > HEAD_BYTES_MAX:
            self._head_bytes = None
            self.send_400_response(f"The headers are longer than {HEAD_BYTES_MAX} bytes.")

    def _await_head(self) -> None:
        self._stop_waiting()
        self._patience = self.loop.call_later(HEAD_S, self._hang_up)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _hang_up(self) -> None:
        logger.debug("headers did not come in %.0f s from %s", HEAD_S, self.client)
        self.transport.close()
