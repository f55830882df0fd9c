"""Runs the app under uvicorn, with an orderly end.

The first SIGTERM or SIGINT drains: new requests get 503, running ones have ``--shutdown-timeout``
to end, then what is left is aborted and the process exits with 0. A second signal aborts at once.
"""

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from shoal.server.config import ServeConfig
from shoal.server.http.auth import is_open
from shoal.server.http.services import Services
from shoal.server.http.wire import Wire

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# After the drain, for answers already made to reach their clients.
_FLUSH_S = 5
_FORCED_FLUSH_S = 1
FORCED_EXIT_CODE = 1
# How long one thread may go on while others want the interpreter's lock. With the usual 5 ms the
# engine and the streams may wait a whole step of a GPU for each upload's and look-up's turn (the
# README has two rounds to compare).
_SWITCH_S = 0.0005


def serve(app: FastAPI, services: Services, config: ServeConfig) -> int:
    """Serve until a signal; return the exit code: 0, or 1 when a second signal cut it short.

    Prints one line with the URL once it listens. Must run in the main thread.

    Raises:
        ValueError: the address cannot be listened on.
    """
    sys.setswitchinterval(_SWITCH_S)
    listener = _listen(config)
    with listener, asyncio.Runner(loop_factory=_new_loop) as runner:
        return runner.run(_serve(app, services, config, listener))


async def _serve(
    app: FastAPI, services: Services, config: ServeConfig, listener: socket.socket
) -> int:
    server = _Server(
        uvicorn.Config(
            app,
            log_config=None,  # the process's own logging applies
            access_log=config.log_level == "debug",
            lifespan="on",
            http=Wire,
            ws="none",
            timeout_graceful_shutdown=_FLUSH_S,
        ),
        url=_url(config.host, listener),
        is_open=await is_open(services),
    )
    drains: list[asyncio.Task[None]] = []

    async def drain(timeout_s: float) -> None:
        if not await services.drain(timeout_s):
            logger.warning("shutdown: some requests were aborted")
        server.should_exit = True

    def on_signal() -> None:
        if len(drains) == 2:
            return
        timeout_s = config.shutdown_timeout
        if drains:
            drains[0].cancel()
            # Not `force_exit`: that would skip the lifespan's end, which stops the engine. And
            # not 0: each client is still to hear why its answer ends here.
            server.config.timeout_graceful_shutdown = _FORCED_FLUSH_S
            timeout_s = 0.0
        logger.info("shutdown: draining for at most %.0f s", timeout_s)
        drains.append(asyncio.create_task(drain(timeout_s)))

    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, on_signal)
    try:
        await server.serve(sockets=[listener])
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)
    return FORCED_EXIT_CODE if len(drains) == 2 else 0


def _new_loop() -> asyncio.AbstractEventLoop:
    """uvloop where there is one: it sends without giving up the interpreter's lock.

    With asyncio's own, each token that leaves is a chance for every other thread to hold it.
    """
    try:
        import uvloop
    except ImportError:  # Windows
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class _Server(uvicorn.Server):
    """uvicorn without signal handlers of its own, that says where it listens."""

    def __init__(self, config: uvicorn.Config, *, url: str, is_open: bool) -> None:
        super().__init__(config)
        self._url = url
        self._is_open = is_open

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            print(f"shoal is listening on {self._url}", flush=True)
            if self._is_open:
                print(
                    "no API keys: everyone on this machine may do everything, until"
                    " `shoal keys create` has made one",
                    flush=True,
                )


def _listen(config: ServeConfig) -> socket.socket:
    try:
        found: Sequence[tuple[int, int, int, str, tuple[object, ...]]] = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, address = found[0]
        # Saying TCP: asyncio turns Nagle's algorithm off for sockets that say so, and with it on,
        # every answer but a connection's first waits 40 ms for the client's delayed ACK.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ValueError(f"cannot listen on {config.host}:{config.port}: {error}") from error
    return listener


def _url(host: str, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
