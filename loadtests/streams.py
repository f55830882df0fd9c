"""Streams that only listen: when did something arrive, and what was the longest silence?

No HTTP client library: of hundreds of streams on the server's own machine, each token that is
parsed here is time taken from what is measured.
"""

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

from shoal.loadtests.client import ServerError

CHUNK = 1 << 16
EVENT = b"data: {"


@dataclass(slots=True)
class Stream:
    """One client that asks again whenever its answer has ended.

    Attributes:
        model: adapter, or the base.
        answers: for each, when its events arrived (seconds of ``time.monotonic``).
        error: what ended it, if anything did.
    """

    model: str
    prompt: Sequence[int]
    max_tokens: int
    answers: list[list[float]] = field(default_factory=list)
    error: str | None = None

    async def listen(self, base_url: str, api_key: str | None) -> None:
        """Until it is cancelled, or fails."""
        body = json.dumps(
            {
                "model": self.model,
                "prompt": list(self.prompt),
                "max_tokens": self.max_tokens,
                "temperature": 0.0,
                "ignore_eos": True,
                "stream": True,
            }
        ).encode()
        try:
            while True:
                arrivals: list[float] = []
                self.answers.append(arrivals)
                await _answer(base_url, api_key, body, arrivals)
        except (OSError, ServerError, asyncio.IncompleteReadError) as problem:
            self.error = f"{type(problem).__name__}: {problem}"

    def gaps(self, begin: float, end: float) -> Iterator[float]:
        """Seconds between neighbouring events of one answer that reach into this time.

        The silence at the end of the time counts as far as it lasted.
        """
        for arrivals in self.answers:
            for one, other in pairwise(arrivals):
                if other > begin and one < end:
                    yield other - one
        last = self.answers[-1] if self.answers else []
        if last and last[-1] < end:
            yield end - last[-1]


async def _answer(base_url: str, api_key: str | None, body: bytes, arrivals: list[float]) -> None:
    """One streamed completion; notes when its events arrive."""
    url = urlsplit(base_url)
    secure = url.scheme == "https"
    reader, writer = await asyncio.open_connection(
        url.hostname, url.port or (443 if secure else 80), ssl=secure or None, limit=CHUNK
    )
    try:
        writer.write(_head(url.netloc, url.path, api_key, len(body)) + body)
        await writer.drain()
        head = await reader.readuntil(b"\r\n\r\n")
        status = head.split(None, 2)[1]
        if status != b"200":
            text = (await reader.read(CHUNK)).decode(errors="replace")
            raise ServerError(f"HTTP {status.decode()}: {text[:300]}")
        while chunk := await reader.read(CHUNK):
            if EVENT in chunk:
                arrivals.append(time.monotonic())
            if b'"error"' in chunk:
                raise ServerError(chunk.decode(errors="replace")[:300])
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def _head(host: str, path: str, api_key: str | None, length: int) -> bytes:
    fields: dict[str, Any] = {
        "Host": host,
        "Content-Type": "application/json",
        "Content-Length": length,
        "Connection": "close",
    }
    if api_key:
        fields["Authorization"] = f"Bearer {api_key}"
    lines = [f"POST {path.rstrip('/')}/v1/completions HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()
