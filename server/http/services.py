"""What the routes work with: the engine, the adapters, the tokenizer, and the state of the door.

Owns admission (draining, requests in flight) and the bounded thread pools for blocking calls, in
which owners take turns. It builds none of what it holds; the command line does. All of it may be in
this process, or what there must be only one of in the engine's (``Remote``).
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from shoal.adapters.spec import AdapterSpec
from shoal.server.config import ServeConfig
from shoal.server.engine.request import Request, TokenEvent
from shoal.server.engine.stats import EngineStats
from shoal.server.http.metrics import Metrics
from shoal.server.http.pools import Pool
from shoal.server.http.quotas import Quotas
from shoal.server.http.runs import LocalRun, Run
from shoal.server.http.uploads import Uploads

if TYPE_CHECKING:  # pulls in the tensor library, which nothing here needs at run time
    from shoal.adapters.blending import Blend
    from shoal.adapters.library import AdapterInfo
    from shoal.adapters.registry.keys import Key, Limits
    from shoal.server.http.jobs import Job

T = TypeVar("T")

Page = tuple[Sequence["AdapterInfo"], str | None]

_POLL_S = 0.02


class Engine(Protocol):
    """The part of ``EngineClient`` that HTTP uses."""

    async def start(self) -> None:
        """Start the engine; its events go to the running event loop."""
        ...

    async def stop(self) -> None:
        """End the engine; what is left is aborted."""
        ...

    def follow(self, request: Request, sink: Callable[[TokenEvent], None]) -> Callable[[], None]:
        """Submit a request and be told of its events; what is returned ends that."""
        ...

    def generate(
        self, request: Request, *, merge: bool = False
    ) -> AsyncGenerator[TokenEvent, None]:
        """Events of one request; closing the generator aborts it."""
        ...

    async def drain(self, timeout_s: float) -> bool:
        """Take nothing new, wait for what runs, abort the rest; whether nothing was aborted."""
        ...

    def stats(self) -> EngineStats:
        """The latest snapshot."""
        ...

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        ...


class Counts(Protocol):
    """The part of ``Metrics`` that routes use."""

    def error(self, status: int) -> None: ...
    def upload(self, outcome: str) -> None: ...
    def render(self) -> bytes:
        """Blocks."""
        ...


class Remote(Protocol):
    """The engine's process, to one that only speaks HTTP for it."""

    @property
    def counts(self) -> Counts: ...

    def run(self, job: "Job") -> Run:
        """As ``Services.run``."""
        ...

    def begin(
        self, owner: str, limits: "Limits", *, upload: bool
    ) -> AbstractAsyncContextManager[None]:
        """As ``Services.begin``."""
        ...

    async def alive(self) -> bool:
        """Whether the engine serves; false too when its process does not answer."""
        ...


class Library(Protocol):
    """The part of ``AdapterLibrary`` that HTTP uses: blocking, thread-safe."""

    def upload(
        self,
        name: str,
        files: Mapping[str, Path],
        *,
        owner: str = "",
        limits: "Limits | None" = None,
    ) -> "AdapterInfo": ...
    def resolve(self, model: str, *, owner: str = "") -> "AdapterInfo": ...
    def stage(self, info: "AdapterInfo") -> AdapterSpec: ...
    def stage_resident(self, wanted: "AdapterInfo | Blend[AdapterInfo]") -> AdapterSpec | None: ...
    def stage_blend(self, blend: "Blend[AdapterInfo]") -> AdapterSpec: ...
    def unstage(self, spec: AdapterSpec) -> None: ...
    def list(self, *, limit: int, after: str | None, prefix: str = "", owner: str = "") -> Page: ...
    def list_shared(self, *, limit: int, after: str | None, owner: str = "") -> Page: ...
    def versions(self, name: str, *, owner: str = "") -> "Sequence[AdapterInfo]": ...
    def activate(self, name: str, version: int, *, owner: str = "") -> "AdapterInfo": ...
    def tag(self, name: str, tags: Mapping[str, str], *, owner: str = "") -> "AdapterInfo": ...
    def share(self, name: str, grantee: str | None, *, owner: str) -> None: ...
    def unshare(self, name: str, grantee: str | None, *, owner: str) -> None: ...
    def grantees(self, name: str, *, owner: str) -> Sequence[str | None]: ...
    def delete(self, name: str, *, owner: str = "") -> None: ...
    def count(self, *, owner: str = "") -> int: ...


class KeyBook(Protocol):
    """The part of ``Keys`` that HTTP uses: blocking, thread-safe."""

    def verify(self, secret: str) -> "Key | None": ...
    def remembered(self, secret: str) -> "Key | None": ...
    def exist(self) -> bool: ...


class TextStream(Protocol):
    """Token ids in, text that later tokens cannot change out."""

    def push(self, ids: Sequence[int]) -> str: ...
    def flush(self) -> str: ...


class TextCodec(Protocol):
    """The part of ``Tokenizer`` that HTTP uses; safe to call from several threads."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...
    def chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]: ...
    def stream(self, skip_special_tokens: bool = True) -> TextStream: ...
    def id_to_text(self, token_id: int) -> str: ...
    def id_to_bytes(self, token_id: int) -> bytes: ...


@dataclass(kw_only=True, slots=True)
class Services:
    """One process's HTTP side.

    Attributes:
        model_name: the base's name in the API.
        keys: of tenants; None if there can be none.
        model_root: what ``/v1/models`` shows as the base's ``root`` (where it came from).
        vocab_size: token ids of a request are below this.
        engine, quotas, uploads: not used where there is a ``remote``.
        remote: the engine's process, unless it is this one; ``library`` and ``keys`` then ask it.
    """

    config: ServeConfig
    engine: Engine
    library: Library
    tokenizer: TextCodec
    model_name: str
    max_model_len: int
    vocab_size: int
    model_root: str = ""
    keys: KeyBook | None = None
    remote: Remote | None = None
    metrics: Metrics = field(init=False)
    uploads: Uploads = field(default_factory=Uploads, init=False)
    quotas: Quotas = field(default_factory=lambda: Quotas(time.monotonic), init=False)
    draining: bool = field(default=False, init=False)
    in_flight: int = field(default=0, init=False)
    started: int = field(default_factory=lambda: int(time.time()), init=False)
    _lookups: Pool = field(init=False)
    _loads: Pool = field(init=False)
    _blends: Pool = field(init=False)
    _texts: Pool = field(init=False)
    _uploads: Pool = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.model_name, stats=self.engine.stats)
        # Long texts and uploads keep a core busy: few at a time, never in the way of look-ups. Nor
        # is what waits for a disk: the first adapter on singular vectors may need gigabytes.
        self._lookups = Pool(8)
        self._loads = Pool(8)
        self._blends = Pool(8)
        self._texts = Pool(2)
        # One beside those that wait for helper processes.
        self._uploads = Pool(1 + max(1, self.config.upload_processes()))

    async def lookup(self, call: Callable[[], T], *, owner: str) -> T:
        """Run a short blocking call in a thread."""
        return await self._lookups.run(call, owner=owner)

    async def load(self, call: Callable[[], T], *, owner: str) -> T:
        """Run what may have to read an adapter, or what it needs of the base, in a thread."""
        return await self._loads.run(call, owner=owner)

    async def compose(self, call: Callable[[], T], *, owner: str) -> T:
        """The same for a blend. Adapters that are loaded do not wait behind those computed."""
        return await self._blends.run(call, owner=owner)

    async def tokenize(self, call: Callable[[], T], *, owner: str) -> T:
        """Run the tokenizer on a long text in a thread."""
        return await self._texts.run(call, owner=owner)

    async def work(self, call: Callable[[], T], *, owner: str) -> T:
        """Run a long blocking call (an upload) in a thread of a smaller pool."""
        return await self._uploads.run(call, owner=owner)

    @property
    def counts(self) -> Counts:
        """Of what is answered."""
        return self.metrics if self.remote is None else self.remote.counts

    def run(self, job: "Job") -> Run:
        """Have a job done. Nothing happens before its events are asked for."""
        return LocalRun(self, job) if self.remote is None else self.remote.run(job)

    @asynccontextmanager
    async def begin(
        self, owner: str, limits: "Limits", *, upload: bool = False
    ) -> AsyncIterator[None]:
        """Count a request, or an upload, among its owner's while the block runs.

        Raises:
            Overloaded: a limit is reached.
        """
        if self.remote is not None:
            async with self.remote.begin(owner, limits, upload=upload):
                yield
            return
        with self.let_in(owner, limits, upload=upload):
            yield

    def let_in(self, owner: str, limits: "Limits", *, upload: bool) -> ExitStack:
        """As ``begin``, where the engine is: from now on, until what is returned is closed."""
        with ExitStack() as stack:
            stack.enter_context(self.quotas.begin(owner, limits))
            if upload:
                stack.enter_context(self.uploads.begin(owner))
            return stack.pop_all()

    async def alive(self) -> bool:
        """Whether the engine serves."""
        return self.engine.alive if self.remote is None else await self.remote.alive()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse what is new, wait for what is in flight, abort what is left.

        Returns:
            Whether everything ended by itself. Calling it again returns at once when nothing runs.
        """
        self.draining = True
        deadline = time.monotonic() + timeout_s
        while self.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
        left = max(0.0, deadline - time.monotonic()) if self.in_flight == 0 else 0.0
        return await self.engine.drain(left) and self.in_flight == 0
