"""Bearer keys: those of ``--api-key``, which may do everything, and those of ``shoal keys``.

Without either every request may pass, which is why such a server listens on loopback only, and
refuses what a web page in a browser on this machine may have sent (``local_only.py``).
"""

import hashlib
import hmac
import ipaddress
import socket
import time
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from shoal.adapters.registry.database import Database
from shoal.adapters.registry.errors import RegistryUnavailable
from shoal.adapters.registry.keys import CACHE_S, Key, Keys
from shoal.server.config import ServeConfig
from shoal.server.errors import ShoalError, Unauthorized
from shoal.server.http.caller import EVERYTHING, Caller, set_caller
from shoal.server.http.errors import error_response, registry_response
from shoal.server.http.local_only import must_be_local
from shoal.server.http.services import Services

# Probes need no key; an unknown path is guarded like a known one.
_OPEN = frozenset({"/health", "/version"})
# Scrapers need none either, as with vLLM, until there are tenants to be told of.
_METRICS = "/metrics"
# Whose turn it is to find out whose a request is; no owner is called so.
UNKNOWN = "?"


class Authenticate:
    """Finds out who calls (``caller.caller_of``), or answers 401 or 403.

    Args:
        static: keys of ``--api-key``.
        monotonic: seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        services: Services,
        static: Sequence[str],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._services = services
        self._static = [hashlib.sha256(key.encode()).digest() for key in static]
        self._monotonic = monotonic
        self._tenants = False
        self._asked_s: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _OPEN:
            await self._app(scope, receive, send)
            return
        try:
            caller = await self._caller(scope)
        except ShoalError as error:
            await error_response(error)(scope, receive, send)
            return
        except RegistryUnavailable as error:
            await registry_response(error)(scope, receive, send)
            return
        set_caller(scope, caller)
        await self._app(scope, receive, send)

    async def _caller(self, scope: MutableMapping[str, Any]) -> Caller:
        """Raises Unauthorized, Forbidden, RegistryUnavailable."""
        has_tenants = await self._has_tenants()
        if not self._static and not has_tenants:
            must_be_local(dict(scope["headers"]), self._services.config.host)
            return EVERYTHING
        if scope["path"] == _METRICS and not has_tenants:
            return EVERYTHING
        secret = _bearer(scope)
        if secret is None:
            raise Unauthorized("no API key: send the header `Authorization: Bearer KEY`")
        # All digests are compared, each in constant time: timing tells nothing about any key.
        asked = hashlib.sha256(secret).digest()
        known = [hmac.compare_digest(asked, digest) for digest in self._static]
        if any(known):
            return EVERYTHING
        key = await self._key(secret.decode("ascii", "replace")) if has_tenants else None
        if key is None:
            raise Unauthorized("the API key is not known")
        return Caller(owner=key.owner, role=key.role, limits=key.limits)

    async def _key(self, secret: str) -> Key | None:
        keys = self._services.keys
        assert keys is not None
        known = keys.remembered(secret)
        if known is not None:
            return known
        return await self._services.lookup(lambda: keys.verify(secret), owner=UNKNOWN)

    async def _has_tenants(self) -> bool:
        """Whether any key was ever made, which is never undone: as of ``CACHE_S`` ago."""
        keys = self._services.keys
        now = self._monotonic()
        due = self._asked_s is None or now - self._asked_s >= CACHE_S
        if keys is not None and due and not self._tenants:
            try:
                self._tenants = await self._services.lookup(keys.exist, owner=UNKNOWN)
            except RegistryUnavailable:
                if self._asked_s is None:
                    raise
            self._asked_s = now
        return self._tenants


async def is_open(services: Services) -> bool:
    """Whether a request needs no key."""
    keys = services.keys
    if services.config.api_key or keys is None:
        return not services.config.api_key
    return not await services.lookup(keys.exist, owner=UNKNOWN)


def check_exposure(config: ServeConfig) -> None:
    """Refuse to be open to other machines.

    Raises:
        ValueError: others reach the address, and there are no keys.
        RegistryUnavailable: whether there are cannot be found out.
    """
    if config.api_key or is_loopback(config.host):
        return
    database = Database(config.registry_url)
    try:
        if Keys(database).exist():
            return
    finally:
        database.close()
    raise ValueError(
        f"--host is {config.host!r}: without API keys this server listens on this machine alone;"
        " make a key with `shoal keys create`, or give one with --api-key"
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``, an address or a name to listen on."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return False
    addresses = {str(entry[4][0]).partition("%")[0] for entry in found}
    return all(ipaddress.ip_address(address).is_loopback for address in addresses)


def _bearer(scope: MutableMapping[str, Any]) -> bytes | None:
    sent: bytes = dict(scope["headers"]).get(b"authorization", b"")
    scheme, _, key = sent.partition(b" ")
    return key.strip() or None if scheme.lower() == b"bearer" else None
