"""Bearer keys. Without ``--api-key`` every request may pass."""

import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from shoal.server.errors import Unauthorized
from shoal.server.http.errors import error_response

# Probes and scrapers need no key, as with vLLM; an unknown path is guarded like a known one.
_OPEN = frozenset({"/health", "/version", "/metrics"})


class RequireKey:
    """Answers 401 unless the request carries one of ``keys``."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._digests and scope["path"] not in _OPEN:
            problem = self._problem(scope)
            if problem is not None:
                await error_response(Unauthorized(problem))(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _problem(self, scope: Scope) -> str | None:
        sent = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = sent.partition(b" ")
        if scheme.lower() != b"bearer" or not key.strip():
            return "no API key: send the header `Authorization: Bearer KEY`"
        # All digests are compared, each in constant time: timing tells nothing about any key.
        asked = _digest(key.strip())
        known = [hmac.compare_digest(asked, digest) for digest in self._digests]
        return None if any(known) else "the API key is not known"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
