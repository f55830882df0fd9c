"""The worker process: ``python -m shoal.server.workers.worker CONTROL``.

CONTROL is the pipe to the engine's process, an inherited socket. The first thing that comes through
it is another socket, to accept connections on. The worker lives as long as the pipe does; signals
are the other's business.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import uvicorn

from shoal.server.garbage import settled
from shoal.server.http.app import create_app
from shoal.server.http.services import Services
from shoal.server.http.serving import SWITCH_S, http_config, new_loop
from shoal.server.model import tokenizer  # noqa: F401  # takes seconds, while there is no setup yet
from shoal.server.workers.messages import Drain, Drained, Exit, Listening, Setup
from shoal.server.workers.pipe import Pipe
from shoal.server.workers.remote import Elsewhere, Remote, RemoteKeys, RemoteLibrary

# How long running requests may take to see that the server is draining; it is told when to end.
_FOREVER_S = 1e9


class _Server(uvicorn.Server):
    """uvicorn without signal handlers, that tells when it listens."""

    def __init__(self, config: uvicorn.Config, tell: Pipe) -> None:
        super().__init__(config)
        self._tell = tell

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._tell.send(Listening())


class Worker:
    """Answers HTTP until the engine's process says that it is enough."""

    def __init__(self) -> None:
        self._remote = Remote()
        self._setup: asyncio.Future[Setup] = asyncio.get_running_loop().create_future()
        self._services: asyncio.Future[Services] = asyncio.get_running_loop().create_future()
        self._server: _Server | None = None
        self._pipe: Pipe | None = None
        self._draining: asyncio.Task[None] | None = None
        self._ending = False

    async def run(self, control: socket.socket, listener: socket.socket) -> None:
        """Serve connections that ``listener`` accepts."""
        self._pipe = await Pipe.over(control, self._received, self._lost)
        self._remote.connect(self._pipe)
        setup = await self._setup
        logging.getLogger().setLevel(setup.config.log_level.upper())
        services = services_of(setup, self._remote)
        app = create_app(services)
        self._server = _Server(http_config(app, setup.config), self._pipe)
        self._services.set_result(services)
        with settled():
            await self._server.serve(sockets=[listener])
        self._ending = True
        self._pipe.close()

    def _received(self, message: object) -> None:
        if self._remote.received(message):
            return
        match message:
            case Setup():
                self._setup.set_result(message)
            case Drain():
                self._draining = asyncio.create_task(self._drain())
            case Exit() if self._server is None:
                os._exit(0)  # nobody was answered yet
            case Exit(flush_s):
                assert self._server is not None
                self._server.config.timeout_graceful_shutdown = flush_s
                self._server.should_exit = True

    async def _drain(self) -> None:
        services = await self._services
        assert self._pipe is not None
        await services.drain(_FOREVER_S)
        self._pipe.send(Drained())

    def _lost(self) -> None:
        self._remote.lost()
        if not self._ending:
            # Nothing can be answered any more, and the port is for a server that can.
            os._exit(1)


def services_of(setup: Setup, remote: Remote) -> Services:
    """What the routes of a worker work with."""
    services = Services(
        config=setup.config,
        engine=Elsewhere(),
        library=RemoteLibrary(remote),
        tokenizer=setup.tokenizer,
        model_name=setup.model_name,
        model_root=setup.model_root,
        max_model_len=setup.max_model_len,
        vocab_size=setup.vocab_size,
        keys=RemoteKeys(remote) if setup.has_keys else None,
        remote=remote,
    )
    services.started = setup.started
    return services


def main(arguments: Sequence[str]) -> None:
    """Serve until the pipe, or the engine's process, ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(
        stream=sys.stderr, level="INFO", format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    sys.setswitchinterval(SWITCH_S)
    control = socket.socket(fileno=int(arguments[0]))
    _, handed, _, _ = socket.recv_fds(control, 1, 1)
    if not handed:
        return  # the engine's process has ended before it could serve
    listener = socket.socket(fileno=handed[0])

    async def work() -> None:
        await Worker().run(control, listener)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(work())


if __name__ == "__main__":
    main(sys.argv[1:])
