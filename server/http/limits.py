"""What is decided about a request before any route sees it: admission while draining, its body."""

import time
from collections import Counter
from collections.abc import Callable

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.server.errors import BodyTooLarge, BodyTooSlow, Draining, Overloaded, ShoalError
from shoal.server.http.caller import caller_of, has_caller
from shoal.server.http.errors import error_response
from shoal.server.http.services import Services

_ALWAYS = frozenset({"/health", "/version", "/metrics"})
_UPLOAD = ("POST", "/v1/adapters")

# A body may pause for so long, and comes at this rate (bytes a second) at least.
PATIENCE_S = 30.0
BODY_RATE = 32 << 10
# Bodies of the largest size whose bytes may be held at a time.
BODIES_MAX = 64


class Admit:
    """Counts requests in flight, and answers 503 to new ones while the server drains."""

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app = app
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        services = self._services
        if scope["type"] != "http" or scope["path"] in _ALWAYS:
            await self._app(scope, receive, send)
            return
        if services.draining:
            services.counts.error(503)
            refusal = Draining("the server is shutting down and takes no new requests")
            await error_response(refusal)(scope, receive, send)
            return
        services.in_flight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            services.in_flight -= 1


class LimitBody:
    """Reads the body of everything but uploads, at most ``max_bytes`` of it, and hands it on.

    Counted as it arrives: a Content-Length may lie or be absent. Uploads count for themselves
    (``uploads.py``), because they are written to disk as they come. None is waited for forever.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._held = Held(BODIES_MAX * max_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not has_caller(scope):  # a probe's body is not read
            await self._app(scope, receive, send)
            return
        receive = InTime(receive)
        if (scope["method"], scope["path"]) == _UPLOAD:
            await self._app(scope, receive, send)
            return
        owner = caller_of(scope).owner
        body = bytearray()
        try:
            try:
                declared = Headers(scope=scope).get("content-length", "")
                if declared.isdigit() and int(declared) > self._max_bytes:
                    raise self._too_large()
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return  # nobody is there to answer
                    part = message.get("body", b"")
                    if len(body) + len(part) > self._max_bytes:
                        raise self._too_large()
                    self._held.take(owner, len(part))
                    body += part
                    if not message.get("more_body", False):
                        break
            except ShoalError as error:
                await error_response(error)(scope, receive, send)
                return
            await self._app(scope, _replay(bytes(body), receive), send)
        finally:
            self._held.give_back(owner, len(body))

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(
            f"the body is larger than {self._max_bytes} bytes, the limit (--max-body-bytes)"
        )


class Held:
    """Bytes of the bodies of requests that have not ended, whose memory they take.

    Args:
        most: of all together; an owner leaves half of them to others.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._bytes: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self._bytes.total()

    def take(self, owner: str, count: int) -> None:
        """Raise Overloaded if there is no room, else ``give_back`` it once."""
        if not count:
            return
        # Without tenants, the only owner's are all.
        room = self._most // 2 if owner else self._most
        if self._bytes[owner] + count > room or self.total + count > self._most:
            raise Overloaded("the bodies of requests take too much memory; try again in 1 s")
        self._bytes[owner] += count

    def give_back(self, owner: str, count: int) -> None:
        self._bytes[owner] -= count
        if not self._bytes[owner]:
            del self._bytes[owner]


class InTime:
    """``receive``, that waits for a body only as long as it comes at a bearable rate.

    Raises:
        BodyTooSlow: it does not.
    """

    def __init__(self, receive: Receive, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._receive = receive
        self._monotonic = monotonic
        self._left_s = PATIENCE_S
        self._complete = False

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()
        began = self._monotonic()
        message: Message | None = None
        if self._left_s > 0:
            with anyio.move_on_after(self._left_s):
                message = await self._receive()
        if message is None:
            self._complete = True  # whoever asks again waits for the client to leave
            raise BodyTooSlow(
                f"the body does not come: it must at {BODY_RATE} bytes a second, but for"
                f" {PATIENCE_S:.0f} s of waiting"
            )
        # What others do meanwhile with what has come is not the client's fault.
        earned_s = len(message.get("body", b"")) / BODY_RATE
        waited_s = self._monotonic() - began
        self._left_s = min(PATIENCE_S, self._left_s - waited_s + earned_s)
        self._complete = message["type"] != "http.request" or not message.get("more_body", False)
        return message


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body in one message, then whatever ``receive`` still says (a disconnect)."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay
