"""The engine's process as a worker sees it: stands behind ``Services`` where the engine is not.

``RemoteLibrary`` and ``RemoteKeys`` block, as what they stand for, and are called from the worker's
pools; everything else belongs to the event loop's thread.
"""

import asyncio
import concurrent.futures
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from shoal.adapters.spec import AdapterSpec
from shoal.server.engine.request import Request, TokenEvent
from shoal.server.engine.stats import EngineStats
from shoal.server.errors import EngineFailure
from shoal.server.http.jobs import Job
from shoal.server.http.runs import Event, Over, merged
from shoal.server.workers.messages import (
    Answer,
    Call,
    Cancel,
    Counted,
    End,
    Ended,
    Start,
    Stop,
    Target,
)
from shoal.server.workers.pipe import Pipe

if TYPE_CHECKING:
    from shoal.adapters.blending import Blend
    from shoal.adapters.library import AdapterInfo
    from shoal.adapters.registry.keys import Key, Limits
    from shoal.server.http.services import Page

# How long the engine's process may take to say that it is well.
ALIVE_S = 2.0

_Reply = Callable[[Any, Exception | None], None]
_Item = Event | Over


class Remote:
    """One worker's end of the pipe; see ``http.services.Remote``.

    Attributes:
        counts: of answers, kept by the engine's process.
    """

    def __init__(self) -> None:
        """To be told of a pipe (``connect``) before anything else is called."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pipe: Pipe | None = None
        self._numbers = itertools.count(1)
        self._replies: dict[int, _Reply] = {}
        self._queues: dict[int, asyncio.Queue[_Item]] = {}
        self.counts = _Counts(self)

    def connect(self, pipe: Pipe) -> None:
        """Send what is to be sent through ``pipe``, from the running event loop's thread."""
        self._loop = asyncio.get_running_loop()
        self._pipe = pipe

    def received(self, message: object) -> bool:
        """Take a message, unless it is for somebody else."""
        if isinstance(message, tuple):
            run, index, event = message
            queue = self._queues.get(run)
            if queue is not None:
                queue.put_nowait((index, event))
        elif isinstance(message, Ended):
            queue = self._queues.get(message.run)
            if queue is not None:
                queue.put_nowait(Over(message.error))
        elif isinstance(message, Answer):
            reply = self._replies.pop(message.call, None)
            if reply is not None:
                reply(message.value, message.error)
        else:
            return False
        return True

    def lost(self) -> None:
        """The engine's process is gone."""
        for queue in self._queues.values():
            queue.put_nowait(Over(_gone()))
        for reply in self._replies.values():
            reply(None, _gone())
        self._replies.clear()

    def send(self, message: object) -> None:
        """Tell the engine's process."""
        assert self._pipe is not None
        self._pipe.send(message)

    def run(self, job: Job) -> "_Run":
        """As ``Services.run``."""
        return _Run(self, job)

    @asynccontextmanager
    async def begin(self, owner: str, limits: "Limits", *, upload: bool) -> AsyncIterator[None]:
        """As ``Services.begin``."""
        number, answered = self._ask("server", "begin", (owner, limits, upload), {})
        try:
            await answered
            yield
        finally:
            self.send(End(number))  # also when the answer has not come yet

    async def alive(self) -> bool:
        """As ``Services.alive``."""
        _, answered = self._ask("server", "alive", (), {})
        try:
            return bool(await asyncio.wait_for(answered, ALIVE_S))
        except (TimeoutError, EngineFailure):
            return False

    def call(self, target: Target, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method over there and wait for it; not on the event loop's thread."""
        answer: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def ask() -> None:
            self._send_call(target, method, args, kwargs, lambda *reply: _settle(answer, *reply))

        assert self._loop is not None
        self._loop.call_soon_threadsafe(ask)
        return answer.result()

    def follow(self, job: Job) -> "tuple[int, asyncio.Queue[_Item]]":
        """Start a run; its number, and where its events arrive."""
        number = next(self._numbers)
        queue: asyncio.Queue[_Item] = asyncio.Queue()
        self._queues[number] = queue
        if self._pipe is None or not self._pipe.open:
            queue.put_nowait(Over(_gone()))
        self.send(Start(number, job))
        return number, queue

    def forget(self, run: int, *, cancel: bool) -> None:
        """Nobody waits for a run any more."""
        del self._queues[run]
        if cancel:
            self.send(Cancel(run))

    def _ask(
        self, target: Target, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[int, asyncio.Future[Any]]:
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def reply(value: Any, error: Exception | None) -> None:
            if answered.done():  # who asked has left
                return
            _settle(answered, value, error)

        return self._send_call(target, method, args, kwargs, reply), answered

    def _send_call(
        self,
        target: Target,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        reply: _Reply,
    ) -> int:
        number = next(self._numbers)
        if self._pipe is None or not self._pipe.open:
            reply(None, _gone())
            return number
        self._replies[number] = reply
        self.send(Call(number, target, method, args, kwargs, str(kwargs.get("owner", ""))))
        return number


class _Run:
    """As ``http.runs.Run``."""

    def __init__(self, remote: Remote, job: Job) -> None:
        self._remote = remote
        self._job = job
        self._number: int | None = None

    def stop(self, index: int) -> None:
        if self._number is not None:
            self._remote.send(Stop(self._number, index))

    async def events(self) -> AsyncGenerator[tuple[int, TokenEvent], None]:
        number, queue = self._remote.follow(self._job)
        self._number = number
        over = False
        try:
            # As in the engine's process: what completes a stop string comes alone.
            async with aclosing(merged(queue, merge=not self._job.stops)) as events:
                async for event in events:
                    yield event
            over = True
        finally:
            self._remote.forget(number, cancel=not over)


class _Counts:
    """As ``http.services.Counts``."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    def error(self, status: int) -> None:
        self._remote.send(Counted("error", status))

    def upload(self, outcome: str) -> None:
        self._remote.send(Counted("upload", outcome))

    def render(self) -> bytes:
        text: bytes = self._remote.call("counts", "render")
        return text


class RemoteLibrary:
    """As ``http.services.Library``, but for what only a run does."""

    def __init__(self, remote: Remote) -> None:
        """Args: where the library is."""
        self._remote = remote

    def upload(
        self,
        name: str,
        files: Mapping[str, Path],
        *,
        owner: str = "",
        limits: "Limits | None" = None,
    ) -> "AdapterInfo":
        """The files lie on the disk that both processes have."""
        return self._info("upload", name, files, owner=owner, limits=limits)

    def resolve(self, model: str, *, owner: str = "") -> "AdapterInfo":
        return self._info("resolve", model, owner=owner)

    def list(self, *, limit: int, after: str | None, prefix: str = "", owner: str = "") -> "Page":
        page: Page = self._call("list", limit=limit, after=after, prefix=prefix, owner=owner)
        return page

    def list_shared(self, *, limit: int, after: str | None, owner: str = "") -> "Page":
        page: Page = self._call("list_shared", limit=limit, after=after, owner=owner)
        return page

    def versions(self, name: str, *, owner: str = "") -> "Sequence[AdapterInfo]":
        found: Sequence[AdapterInfo] = self._call("versions", name, owner=owner)
        return found

    def activate(self, name: str, version: int, *, owner: str = "") -> "AdapterInfo":
        return self._info("activate", name, version, owner=owner)

    def tag(self, name: str, tags: Mapping[str, str], *, owner: str = "") -> "AdapterInfo":
        return self._info("tag", name, tags, owner=owner)

    def share(self, name: str, grantee: str | None, *, owner: str) -> None:
        self._call("share", name, grantee, owner=owner)

    def unshare(self, name: str, grantee: str | None, *, owner: str) -> None:
        self._call("unshare", name, grantee, owner=owner)

    def grantees(self, name: str, *, owner: str) -> Sequence[str | None]:
        found: Sequence[str | None] = self._call("grantees", name, owner=owner)
        return found

    def delete(self, name: str, *, owner: str = "") -> None:
        self._call("delete", name, owner=owner)

    def count(self, *, owner: str = "") -> int:
        return int(self._call("count", owner=owner))

    def stage(self, info: "AdapterInfo") -> AdapterSpec:
        _only_runs()

    def stage_resident(self, wanted: "AdapterInfo | Blend[AdapterInfo]") -> AdapterSpec | None:
        _only_runs()

    def stage_blend(self, blend: "Blend[AdapterInfo]") -> AdapterSpec:
        _only_runs()

    def unstage(self, spec: AdapterSpec) -> None:
        _only_runs()

    def _info(self, method: str, *args: Any, **kwargs: Any) -> "AdapterInfo":
        info: AdapterInfo = self._call(method, *args, **kwargs)
        return info

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._remote.call("library", method, *args, **kwargs)


class RemoteKeys:
    """As ``http.services.KeyBook``. Nothing is remembered here: a revoked key would live longer."""

    def __init__(self, remote: Remote) -> None:
        """Args: where the keys are."""
        self._remote = remote

    def verify(self, secret: str) -> "Key | None":
        key: Key | None = self._remote.call("keys", "verify", secret)
        return key

    def remembered(self, secret: str) -> "Key | None":
        return None

    def exist(self) -> bool:
        return bool(self._remote.call("keys", "exist"))


class Elsewhere:
    """Stands for the engine in a worker's ``Services``: it is in another process."""

    alive = True

    async def start(self) -> None:
        """Nothing to do here."""

    async def stop(self) -> None:
        """Nothing to do here."""

    async def drain(self, timeout_s: float) -> bool:
        """Nothing to do here."""
        return True

    def follow(self, request: Request, sink: Callable[[TokenEvent], None]) -> Callable[[], None]:
        _only_runs()

    def generate(
        self, request: Request, *, merge: bool = False
    ) -> AsyncGenerator[TokenEvent, None]:
        _only_runs()

    def stats(self) -> EngineStats:
        """Of no engine: what counts is counted where it is."""
        return EngineStats()


def _settle(
    future: "concurrent.futures.Future[Any] | asyncio.Future[Any]",
    value: Any,
    error: Exception | None,
) -> None:
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)


def _gone() -> EngineFailure:
    return EngineFailure("the engine's process is gone")


def _only_runs() -> NoReturn:
    raise AssertionError("runs are the engine's process's")
