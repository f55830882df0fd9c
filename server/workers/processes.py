"""Starts worker processes, and new ones in the place of those that died.

Each has a listening socket of its own on the one port (``SO_REUSEPORT``: the kernel spreads
connections over them), which stays when its worker dies, with whoever is waiting there.
"""

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from shoal.server.config import ServeConfig
from shoal.server.http.services import Services
from shoal.server.http.serving import listen, url_of
from shoal.server.workers.hosting import Host
from shoal.server.workers.messages import Drain, Exit, Setup
from shoal.server.workers.pipe import Pipe

log = logging.getLogger(__name__)

# A worker that died is followed by another at once, the next after twice as long, ...
_AGAIN_S = 0.25
_AGAIN_MAX_S = 10.0
# ... until one has lived so long.
_WELL_S = 60.0
# For a worker to end by itself, beyond what its answers take.
_END_S = 2.0
# A worker that does not listen after so long is spoken of, again and again.
LATE_S = 20.0


class _Process:
    """A worker that was started, and the engine's end of its pipe."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        # -P: a folder that happens to be the current one is no place for modules. What is on this
        # process's path beyond the environment's (a test's, say) comes first in the worker's.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with theirs:
            control = theirs.fileno()
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "shoal.server.workers.worker", str(control)],
                pass_fds=[control],
                stdin=subprocess.DEVNULL,
                env=environment,
                # The terminal's Ctrl-C is for the engine's process, which ends its workers.
                start_new_session=True,
            )
        self.since = time.monotonic()

    def end(self, within_s: float = 0.0) -> None:
        """Wait so long, then kill it. Blocks."""
        with contextlib.suppress(OSError):
            self.control.close()
        try:
            self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Workers:
    """The workers of one server: processes first, which take seconds to start, then what they do.

    Attributes:
        hosts: the workers that serve, by place.
        url: where they listen, once they serve.
    """

    def __init__(self, count: int) -> None:
        """Start so many processes; see ``started``."""
        self._processes = [_Process() for _ in range(count)]
        self._listeners: list[socket.socket] = []
        self._setup: Setup | None = None
        self._keepers: list[asyncio.Task[None]] = []
        self.hosts: dict[int, Host] = {}
        self.url = ""

    @property
    def pids(self) -> list[int]:
        """Of the processes there are."""
        return [process.process.pid for process in self._processes]

    async def serve(self, services: Services) -> None:
        """Let them answer for ``services``; returns once all listen.

        Raises:
            ValueError: the address cannot be listened on.
            OSError: one ended before it listened.
        """
        self._listen(services.config)
        self._setup = Setup(
            config=services.config,
            tokenizer=services.tokenizer,
            model_name=services.model_name,
            model_root=services.model_root,
            max_model_len=services.max_model_len,
            vocab_size=services.vocab_size,
            started=services.started,
            has_keys=services.keys is not None,
        )
        for place in range(len(self._processes)):
            await self._host(place, services)
        for place, host in list(self.hosts.items()):
            await self._listening(place, host)
            if host.gone.is_set():
                code = await asyncio.to_thread(self._processes[place].process.wait)
                raise OSError(f"an HTTP process ended with {code} before it listened")
        self._keepers = [
            asyncio.create_task(self._keep(place, services)) for place in range(len(self.hosts))
        ]

    def drain(self) -> None:
        """Let them refuse what is new."""
        for keeper in self._keepers:
            keeper.cancel()
        for host in self.hosts.values():
            host.send(Drain())

    async def drained(self) -> None:
        """Returns once nothing is in flight."""
        for host in self.hosts.values():
            await host.drained.wait()

    async def exit(self, flush_s: int) -> None:
        """End them, once what is answered has left or ``flush_s`` are over."""
        for listener in self._listeners:
            listener.close()  # the workers close theirs: from then on nobody waits in vain
        for host in self.hosts.values():
            host.send(Exit(flush_s))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(flush_s + _END_S):
                for host in self.hosts.values():
                    await host.gone.wait()
        # Their pipes must end before the event loop closes: uvloop's would wait for them.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_S):
                for place, host in self.hosts.items():
                    if not host.gone.is_set():
                        self._processes[place].process.kill()
                        await host.gone.wait()

    def close(self) -> None:
        """End the processes, whatever they do. Blocks for a moment."""
        for process in self._processes:
            process.end()
        for listener in self._listeners:
            listener.close()

    def _listen(self, config: ServeConfig) -> None:
        # The first bind finds out whether the port is free: with SO_REUSEPORT, another server of
        # the same user would share it silently.
        with listen(config) as probe:
            port = probe.getsockname()[1]
        for _ in self._processes:
            self._listeners.append(listen(config, port=port, shared=True))
        self.url = url_of(config.host, self._listeners[0])

    async def _host(self, place: int, services: Services) -> None:
        control = self._processes[place].control
        # It is still blocking, and holds one byte with ease.
        socket.send_fds(control, [b"L"], [self._listeners[place].fileno()])
        host = Host(services)
        host.connect(await Pipe.over(control, host.received, host.lost))
        self.hosts[place] = host
        host.send(self._setup)

    async def _listening(self, place: int, host: Host) -> None:
        """Returns once a worker listens, or is gone; says so when that takes long."""
        waiting = asyncio.ensure_future(host.listening.wait())
        try:
            while not (await asyncio.wait((waiting,), timeout=LATE_S))[0]:
                pid = self._processes[place].process.pid
                log.warning("still waiting for an HTTP process to listen pid=%d", pid)
        finally:
            waiting.cancel()

    async def _keep(self, place: int, services: Services) -> None:
        """Put another worker in the place of each that dies."""
        pause_s = _AGAIN_S
        while True:
            await self.hosts[place].gone.wait()
            process = self._processes[place]
            await asyncio.to_thread(process.end, _END_S)
            lived_s = time.monotonic() - process.since
            pause_s = _AGAIN_S if lived_s >= _WELL_S else min(2 * pause_s, _AGAIN_MAX_S)
            log.error(
                "an HTTP process died pid=%d code=%d: another starts in %.2f s",
                process.process.pid,
                process.process.returncode,
                pause_s,
            )
            await asyncio.sleep(pause_s)
            try:
                self._processes[place] = _Process()
                await self._host(place, services)
            except OSError as problem:  # there is no room for it, or it died at once
                log.error("an HTTP process did not start: %s", problem)
                self.hosts[place].gone.set()


@contextmanager
def started(count: int) -> Iterator[Workers]:
    """``count`` workers that wait for ``Workers.serve``; ended with the block.

    Raises:
        OSError: no process can be started.
    """
    workers = Workers(count)
    try:
        yield workers
    finally:
        workers.close()
