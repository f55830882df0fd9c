"""Messages over a stream socket between two processes that trust each other.

What is sent during one turn of the event loop leaves as one frame: its length and a pickle. So a
step's events, however many, are one write and one read.
"""

import asyncio
import pickle
import socket
import struct
from collections.abc import Callable
from typing import Any, cast

_LENGTH = struct.Struct("<Q")


class Pipe(asyncio.Protocol):
    """One end. All methods are for the event loop's thread.

    Args:
        received: called with each message, in order.
        lost: called once, when the other end is gone; nothing is received afterwards.
    """

    def __init__(self, received: Callable[[Any], None], lost: Callable[[], None]) -> None:
        self._received = received
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._incoming = bytearray()
        self._outgoing: list[Any] = []

    @classmethod
    async def over(
        cls, end: socket.socket, received: Callable[[Any], None], lost: Callable[[], None]
    ) -> "Pipe":
        """A pipe over a connected Unix socket, which it closes."""
        loop = asyncio.get_running_loop()
        _, pipe = await loop.create_unix_connection(lambda: cls(received, lost), sock=end)
        return pipe

    @property
    def open(self) -> bool:
        """Whether the other end may hear what is sent."""
        return self._transport is not None

    def send(self, message: Any) -> None:
        """Send a message; nothing happens when the other end is gone."""
        if self._transport is None:
            return
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(message)

    def close(self) -> None:
        """Send what is to be sent, then hang up."""
        if self._transport is not None:
            self._flush()
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As asyncio calls it."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        """As asyncio calls it."""
        incoming = self._incoming
        incoming += data
        start, head = 0, _LENGTH.size
        while len(incoming) - start >= head:
            (length,) = _LENGTH.unpack_from(incoming, start)
            end = start + head + length
            if len(incoming) < end:
                break
            with memoryview(incoming) as view, view[start + head : end] as frame:
                messages = pickle.loads(frame)
            start = end
            for message in messages:
                self._received(message)
        del incoming[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        """As asyncio calls it."""
        self._transport = None
        self._outgoing.clear()
        self._lost()

    def _flush(self) -> None:
        if self._transport is None or not self._outgoing:
            return
        messages, self._outgoing = self._outgoing, []
        try:
            frame = pickle.dumps(messages, protocol=pickle.HIGHEST_PROTOCOL)
        except Exception:
            # A bug. Whoever waits for one of these would wait for ever; a broken pipe is seen.
            self._transport.abort()
            raise
        self._transport.write(_LENGTH.pack(len(frame)) + frame)
