"""What is decided about a request before any route sees it: admission while draining, body size."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.server.errors import BodyTooLarge, Draining
from shoal.server.http.errors import error_response
from shoal.server.http.services import Services

_ALWAYS = frozenset({"/health", "/version", "/metrics"})
_UPLOAD = ("POST", "/v1/adapters")


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
            services.metrics.error(503)
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
    (``uploads.py``), because they are written to disk as they come.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["method"], scope["path"]) == _UPLOAD:
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared) > self._max_bytes:
            await self._refuse(scope, receive, send)
            return
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return  # nobody is there to answer
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                await self._refuse(scope, receive, send)
                return
            if not message.get("more_body", False):
                break
        await self._app(scope, _replay(bytes(body), receive), send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = BodyTooLarge(
            f"the body is larger than {self._max_bytes} bytes, the limit (--max-body-bytes)"
        )
        await error_response(error)(scope, receive, send)


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
