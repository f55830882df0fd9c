"""One worker as the engine's process sees it: does what it asks, and forgets it with its pipe."""

import asyncio
import logging
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from shoal.adapters.errors import AdapterError
from shoal.adapters.registry.errors import RegistryError
from shoal.adapters.registry.keys import Limits
from shoal.server.errors import Overloaded, ShoalError
from shoal.server.http.auth import UNKNOWN
from shoal.server.http.runs import LocalRun
from shoal.server.http.services import Services
from shoal.server.workers.messages import (
    Answer,
    Call,
    Cancel,
    Counted,
    Drained,
    End,
    Ended,
    Listening,
    Start,
    Stop,
)
from shoal.server.workers.pipe import Pipe

log = logging.getLogger(__name__)

# What a request may be refused with; everything else is a bug, told here and not to the client.
_EXPECTED = (ShoalError, AdapterError, RegistryError)


class Host:
    """Serves one worker, on the event loop that the engine's events go to.

    Attributes:
        listening, drained, gone: set when the worker says so, or ends.
    """

    def __init__(self, services: Services) -> None:
        """Args: those of the engine's process."""
        self._services = services
        self._pipe: Pipe | None = None
        self._runs: dict[int, tuple[LocalRun, asyncio.Task[None]]] = {}
        self._calls: set[asyncio.Task[None]] = set()
        # What was let in and has not ended.
        self._grants: dict[int, ExitStack] = {}
        self.listening = asyncio.Event()
        self.drained = asyncio.Event()
        self.gone = asyncio.Event()

    def connect(self, pipe: Pipe) -> None:
        """Send what is to be sent through ``pipe``."""
        self._pipe = pipe

    def send(self, message: object) -> None:
        """Tell the worker; nothing happens when it is gone."""
        if self._pipe is not None:
            self._pipe.send(message)

    def close(self) -> None:
        """Hang up, which ends the worker."""
        if self._pipe is not None:
            self._pipe.close()

    def received(self, message: object) -> None:
        """Do what the worker asks."""
        match message:
            case Start(number, job):
                run = LocalRun(self._services, job)
                task = asyncio.create_task(self._follow(number, run))
                self._runs[number] = run, task
                # Not by the task itself: cancelled by the next message, it never begins.
                task.add_done_callback(lambda _: self._runs.pop(number))
            case Stop(number, index):
                if number in self._runs:
                    self._runs[number][0].stop(index)
            case Cancel(number):
                if number in self._runs:
                    self._runs[number][1].cancel()
            case Call(number, "server", "begin", (owner, limits, upload)):
                self._let_in(number, owner, limits, upload)
            case Call():
                task = asyncio.create_task(self._answer(message))
                self._calls.add(task)
                task.add_done_callback(self._calls.discard)
            case End(number):
                self._grants.pop(number, ExitStack()).close()
            case Counted("error", status):
                self._services.metrics.error(int(status))
            case Counted("upload", outcome):
                self._services.metrics.upload(str(outcome))
            case Listening():
                self.listening.set()
            case Drained():
                self.drained.set()
            case _:
                raise AssertionError(f"a worker said {message!r}")

    def lost(self) -> None:
        """The worker is gone: nobody reads its answers any more."""
        for _, task in self._runs.values():
            task.cancel()
        for task in self._calls:
            task.cancel()  # a thread that works on one goes on
        for grant in self._grants.values():
            grant.close()
        self._grants.clear()
        self.gone.set()
        self.drained.set()
        self.listening.set()  # or never: who waits for it looks whether it is gone

    def _let_in(self, number: int, owner: str, limits: Limits, upload: bool) -> None:
        # At once: it may be ended by the next message.
        error: Exception | None = None
        try:
            self._grants[number] = self._services.let_in(owner, limits, upload=upload)
        except Overloaded as refusal:
            error = _told(refusal)
        self.send(Answer(number, None, error))

    async def _follow(self, number: int, run: LocalRun) -> None:
        error: Exception | None = None
        try:
            await run.run(lambda index, event: self.send((number, index, event)))
        except Exception as problem:
            error = _told(problem)
        self.send(Ended(number, error))

    async def _answer(self, call: Call) -> None:
        value: Any = None
        error: Exception | None = None
        try:
            value = await self._call(call)
        except Exception as problem:
            error = _told(problem)
        self.send(Answer(call.call, value, error))

    async def _call(self, call: Call) -> Any:
        services = self._services
        match call.target, call.method:
            case "server", "alive":
                return services.engine.alive
            case "keys", method:
                assert services.keys is not None
                if method == "verify":
                    known = services.keys.remembered(*call.args)
                    if known is not None:
                        return known
                work = getattr(services.keys, method)
                return await services.lookup(lambda: work(*call.args), owner=UNKNOWN)
            case "counts", method:
                return await self._in_thread(getattr(services.metrics, method), call)
            case "library", "upload":
                upload = services.library.upload
                return await services.work(
                    lambda: upload(*call.args, **call.kwargs), owner=call.owner
                )
            case "library", method:
                return await self._in_thread(getattr(services.library, method), call)
        raise AssertionError(f"a worker asked for {call.target}.{call.method}")

    async def _in_thread(self, method: Callable[..., Any], call: Call) -> Any:
        return await self._services.lookup(
            lambda: method(*call.args, **call.kwargs), owner=call.owner
        )


def _told(problem: Exception) -> Exception:
    """What the worker is told of a failure."""
    if not isinstance(problem, _EXPECTED):
        log.error("a worker's request failed", exc_info=problem)
        return RuntimeError(f"{type(problem).__name__} in the engine's process")
    problem.__cause__ = problem.__context__ = None
    try:
        pickle.loads(pickle.dumps(problem))
    except Exception:
        return RuntimeError(f"{type(problem).__name__} in the engine's process: {problem}")
    return problem
