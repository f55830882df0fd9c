"""Runs the app under uvicorn, with an orderly end.

The first SIGTERM or SIGINT drains: new requests get 503, running ones have ``--shutdown-timeout``
to end, then what is left is aborted and the process exits with 0. A second signal aborts at once.
"""

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from shoal.server.config import ServeConfig
from shoal.server.garbage import settled
from shoal.server.http.auth import is_open
from shoal.server.http.services import Services
from shoal.server.http.wire import Wire

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# After the drain, for answers already made to reach their clients.
FLUSH_S = 5
FORCED_FLUSH_S = 1
FORCED_EXIT_CODE = 1
# How long one thread may go on while others want the interpreter's lock. With the usual 5 ms the
# engine and the streams may wait a whole step of a GPU for each upload's and look-up's turn (the
# README has two rounds to compare).
SWITCH_S = 0.0005


def serve(app: FastAPI, services: Services, config: ServeConfig) -> int:
    """Serve until a signal; return the exit code: 0, or 1 when a second signal cut it short.

    Prints one line with the URL once it listens. Must run in the main thread.

    Raises:
        ValueError: the address cannot be listened on.
    """
    sys.setswitchinterval(SWITCH_S)
    with listen(config) as listener, asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(_serve(app, services, config, listener))


async def _serve(
    app: FastAPI, services: Services, config: ServeConfig, listener: socket.socket
) -> int:
    server = _Server(
        http_config(app, config),
        url=url_of(config.host, listener),
        is_open=await is_open(services),
    )

    def end() -> None:
        server.should_exit = True

    def forced() -> None:
        # Not `force_exit`: that would skip the lifespan's end, which stops the engine. And
        # not 0: each client is still to hear why its answer ends here.
        server.config.timeout_graceful_shutdown = FORCED_FLUSH_S

    ending = Ending(services.drain, end, forced, config.shutdown_timeout)
    with settled(grows=True), ending.on_signals():
        await server.serve(sockets=[listener])
    return ending.exit_code


class Ending:
    """What signals do: the first drains, a second cuts that short, others do nothing.

    Args:
        drain: see ``Services.drain``.
        end: called after it.
        forced: called before, when there was a second signal.
        timeout_s: for running requests.

    Attributes:
        exit_code: of the process.
    """

    def __init__(
        self,
        drain: Callable[[float], Awaitable[bool]],
        end: Callable[[], None],
        forced: Callable[[], None],
        timeout_s: float,
    ) -> None:
        self._drain = drain
        self._end = end
        self._forced = forced
        self._timeout_s = timeout_s
        self._drains: list[asyncio.Task[None]] = []

    @property
    def exit_code(self) -> int:
        return FORCED_EXIT_CODE if len(self._drains) == 2 else 0

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Signals are taken while the block runs."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if len(self._drains) == 2:
            return
        timeout_s = self._timeout_s
        if self._drains:
            self._drains[0].cancel()
            self._forced()
            timeout_s = 0.0
        logger.info("shutdown: draining for at most %.0f s", timeout_s)
        self._drains.append(asyncio.create_task(self._drained(timeout_s)))

    async def _drained(self, timeout_s: float) -> None:
        if not await self._drain(timeout_s):
            logger.warning("shutdown: some requests were aborted")
        self._end()


def http_config(app: FastAPI, config: ServeConfig) -> uvicorn.Config:
    """How uvicorn is to serve the app."""
    return uvicorn.Config(
        app,
        log_config=None,  # the process's own logging applies
        access_log=config.log_level == "debug",
        lifespan="on",
        http=Wire,
        ws="none",
        timeout_graceful_shutdown=FLUSH_S,
    )


def new_loop() -> asyncio.AbstractEventLoop:
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
            announce(self._url, is_open=self._is_open)


def announce(url: str, *, is_open: bool) -> None:
    """Print where the server listens, and whom it lets in."""
    print(f"shoal is listening on {url}", flush=True)
    if is_open:
        print(
            "no API keys: everyone on this machine may do everything, until"
            " `shoal keys create` has made one",
            flush=True,
        )


def listen(config: ServeConfig, *, port: int | None = None, shared: bool = False) -> socket.socket:
    """A socket bound to the configured address; it does not listen yet.

    Args:
        port: another than the configured one.
        shared: others of this user may bind to it, too, if they say so.

    Raises:
        ValueError: the address cannot be listened on.
    """
    port = config.port if port is None else port
    try:
        found: Sequence[tuple[int, int, int, str, tuple[object, ...]]] = socket.getaddrinfo(
            config.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, address = found[0]
        # Saying TCP: asyncio turns Nagle's algorithm off for sockets that say so, and with it on,
        # every answer but a connection's first waits 40 ms for the client's delayed ACK.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ValueError(f"cannot listen on {config.host}:{port}: {error}") from error
    return listener


def url_of(host: str, listener: socket.socket) -> str:
    """What to type to reach it."""
    port = listener.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
