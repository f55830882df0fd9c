"""The real app, engine loop, scheduler and tokenizer over a fake runner and a library in memory."""

import hashlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shoal.adapters.blending import Blend
from shoal.adapters.errors import (
    AdapterConflict,
    AdapterNameInvalid,
    AdapterNotFound,
    AdapterRejected,
    AdapterTooLarge,
    BlendRefused,
)
from shoal.adapters.slots import SlotTable
from shoal.adapters.spec import ADAPTER_NAME, AdapterSpec
from shoal.server.config import ServeConfig
from shoal.server.engine.client import EngineClient
from shoal.server.engine.loop import EngineLoop
from shoal.server.engine.plan import StepPlan
from shoal.server.engine.scheduler import Scheduler, SchedulerLimits
from shoal.server.http.app import create_app
from shoal.server.http.services import KeyBook, Services
from shoal.server.model.fake import FakeRunner
from shoal.server.model.tokenizer import Tokenizer
from shoal.server.workers.hosting import Host
from shoal.server.workers.pipe import Pipe
from shoal.server.workers.remote import Elsewhere, Remote, RemoteKeys, RemoteLibrary

EOS = 1
MAX_MODEL_LEN = 256
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Info:
    """As ``AdapterInfo``."""

    name: str
    version: int
    digest: str
    family: str = "core"
    format: str = "lora_xs"
    rank: int = 4
    bytes: int = 100
    created: float = 1_700_000_000.0
    active: bool = True
    basis_id: str | None = None
    packed_elements: int = 64
    owner: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    used: float | None = None

    @property
    def reference(self) -> str:
        return f"{self.owner}/{self.name}" if self.owner else self.name


InfoPage = tuple[list[Info], str | None]


class MemoryLibrary:
    """The library's contract, on dicts, for one owner; counts pins and how uploads were left."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._versions: dict[str, list[Info]] = {}
        self._active: dict[str, int] = {}
        self.pins: dict[str, int] = {}
        self.staged = 0
        self.blends: list[Blend[Info]] = []
        self.folders: list[Path] = []

    def upload(self, name: str, files: Mapping[str, Path], **whose: Any) -> Info:
        self.folders += [path.parent for path in files.values()]
        if not ADAPTER_NAME.fullmatch(name):
            raise AdapterNameInvalid(f"adapter name {name!r} must match {ADAPTER_NAME.pattern}")
        if name == "base":
            raise AdapterConflict("the name 'base' is reserved")
        content = b"".join(files[key].read_bytes() for key in sorted(files))
        if b"bad" in content:
            raise AdapterRejected("layers.0.q_proj.R", "must be finite")
        digest = hashlib.sha256(content).hexdigest()
        with self._guard:
            known = self._versions.setdefault(name, [])
            found = next((info for info in known if info.digest == digest), None)
            if found is None:
                found = Info(name, len(known) + 1, digest)
                known.append(found)
            self._active[name] = found.version
        return found

    def resolve(self, model: str, *, owner: str = "") -> Info:
        name, at, version = model.partition("@")
        with self._guard:
            if name not in self._active or (at and not version):
                raise AdapterNotFound(f"no adapter {model!r}")
            number = int(version) if version.isdigit() else 0 if version else self._active[name]
            if not 1 <= number <= len(self._versions[name]):
                raise AdapterNotFound(f"no adapter {model!r}")
            return replace(self._versions[name][number - 1], active=number == self._active[name])

    def stage(self, info: Info) -> AdapterSpec:
        with self._guard:
            self.pins[info.digest] = self.pins.get(info.digest, 0) + 1
            self.staged += 1
        return AdapterSpec(info.digest, "core", info.rank, info.basis_id, info.packed_elements)

    def stage_resident(self, wanted: object) -> AdapterSpec | None:
        return None  # so that every request takes the longer way

    def stage_blend(self, blend: Blend[Info]) -> AdapterSpec:
        for info, _ in blend.parts:
            if info.name.startswith("refused"):
                raise BlendRefused(f"the blend is too large, {info.name!r} is the largest")
            if info.name.startswith("crowded"):
                raise AdapterTooLarge("0 of 0 bytes are free")
        self.blends.append(blend)
        return self.stage(Info("blend", 1, blend.digest))

    def unstage(self, spec: AdapterSpec) -> None:
        with self._guard:
            assert self.pins[spec.digest] > 0, "unstaged more often than staged"
            self.pins[spec.digest] -= 1

    def list(
        self, *, limit: int, after: str | None = None, prefix: str = "", owner: str = ""
    ) -> InfoPage:
        assert limit >= 1
        names = sorted(n for n in self._active if n.startswith(prefix) and n > (after or ""))
        page = [self.resolve(name) for name in names[:limit]]
        return page, page[-1].name if len(names) > limit else None

    def list_shared(self, *, limit: int, after: str | None = None, owner: str = "") -> InfoPage:
        return [], None

    def versions(self, name: str, *, owner: str = "") -> Sequence[Info]:
        latest = self.resolve(name)
        return [replace(i, active=i.version == latest.version) for i in self._versions[name]]

    def activate(self, name: str, version: int, *, owner: str = "") -> Info:
        self.resolve(f"{name}@{version}")
        self._active[name] = version
        return self.resolve(name)

    def delete(self, name: str, *, owner: str = "") -> None:
        self.resolve(name)
        del self._active[name]

    def count(self, *, owner: str = "") -> int:
        return len(self._active)


class Gate:
    """Lets steps through, or holds them; stands before every step of the fake device."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self.error: Exception | None = None
        self.delay_s = 0.0
        self.steps = 0  # that came here

    def __call__(self, plan: StepPlan) -> None:
        if self.delay_s:
            time.sleep(self.delay_s)
        self.steps += 1
        self._open.wait(10)
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()


@dataclass
class Harness:
    """One served app."""

    app: FastAPI
    client: httpx.AsyncClient
    services: Services
    library: MemoryLibrary
    runner: FakeRunner
    gate: Gate
    tokenizer: Tokenizer

    async def chat(self, **fields: object) -> httpx.Response:
        body = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
        return await self.client.post("/v1/chat/completions", json=body | fields)

    async def complete(self, **fields: object) -> httpx.Response:
        body = {"model": "base", "prompt": "hello", "max_tokens": 8}
        return await self.client.post("/v1/completions", json=body | fields)

    async def upload(self, name: str, content: bytes = b"data") -> httpx.Response:
        files = [("file", ("adapter_config.json", b"{}")), ("file", ("adapter_model", content))]
        return await self.client.post("/v1/adapters", data={"name": name}, files=files)

    def all_given_back(self) -> bool:
        stats = self.services.engine.stats()
        return (
            not any(self.library.pins.values())
            and stats.running == stats.waiting == stats.kv_blocks_used == 0
            and self.services.in_flight == 0
        )


Serve = Callable[..., AbstractAsyncContextManager[Harness]]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """One token per byte, so that characters are often split between tokens."""
    vocab = {"<unk>": 0, "<eos>": EOS}
    for piece in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[piece] = len(vocab)
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = CHAT_TEMPLATE
    return Tokenizer(fast)


# Modules whose tests run a second time with every request through a worker's pipe.
TWICE = ("blends", "errors", "generation", "adapters")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    module = metafunc.module.__name__.rpartition("test_http_")[2]
    if module in TWICE and "where" in metafunc.fixturenames:
        metafunc.parametrize("where", ("here", "apart"))


@pytest.fixture
def where() -> str:
    """Where the engine is: in the process that speaks HTTP, or apart from it."""
    return "here"


def beside(services: Services) -> Services:
    """A worker's services, whose engine's process is this one; connected by the app's lifespan."""
    remote = Remote()
    ends: list[Pipe] = []

    class Beside(Elsewhere):
        async def start(self) -> None:
            ours, theirs = socket.socketpair()
            host = Host(services)
            ends.append(await Pipe.over(ours, host.received, host.lost))
            host.connect(ends[-1])
            ends.append(await Pipe.over(theirs, remote.received, remote.lost))
            remote.connect(ends[-1])
            await services.engine.start()

        async def drain(self, timeout_s: float) -> bool:
            services.draining = True
            return await services.engine.drain(timeout_s)

        async def stop(self) -> None:
            await services.engine.stop()
            for end in ends:
                end.close()

    return Services(
        config=services.config,
        engine=Beside(),
        library=RemoteLibrary(remote),
        tokenizer=services.tokenizer,
        model_name=services.model_name,
        max_model_len=services.max_model_len,
        vocab_size=services.vocab_size,
        keys=None if services.keys is None else RemoteKeys(remote),
        remote=remote,
    )


@dataclass
class Parts:
    """An app that nobody runs yet."""

    app: FastAPI
    services: Services
    library: MemoryLibrary
    runner: FakeRunner
    gate: Gate


@pytest.fixture
def build(tokenizer: Tokenizer, where: str) -> Callable[..., Parts]:
    """``build(max_waiting=1)`` with fields of ``ServeConfig``."""

    def make(library: Any = None, keys: KeyBook | None = None, **fields: object) -> Parts:
        config = ServeConfig(**{"served_model_name": "base", "shutdown_timeout": 0.2, **fields})
        gate = Gate()
        runner = FakeRunner(tokenizer.vocab_size, 16, before_step=gate)
        limits = SchedulerLimits(
            block_tokens=16,
            num_blocks=256,
            max_num_seqs=64,
            max_num_batched_tokens=512,
            max_model_len=MAX_MODEL_LEN,
            max_waiting=config.max_waiting,
            max_waiting_per_tenant=config.max_waiting_per_tenant,
            max_wait_s=config.max_wait,
        )
        scheduler = Scheduler(limits, SlotTable(1024, 64), frozenset({EOS}))
        library = library or MemoryLibrary()
        services = Services(
            config=config,
            engine=EngineClient(partial(EngineLoop, scheduler, runner)),
            library=library,
            tokenizer=tokenizer,
            model_name="base",
            max_model_len=MAX_MODEL_LEN,
            vocab_size=tokenizer.vocab_size,
            keys=keys,
        )
        app = create_app(beside(services) if where == "apart" else services)
        return Parts(app, services, library, runner, gate)

    return make


@pytest.fixture
def serve(build: Callable[..., Parts], tokenizer: Tokenizer) -> Serve:
    """``async with serve(max_waiting=1) as h:`` with fields of ``ServeConfig``."""

    @asynccontextmanager
    async def start(**fields: object) -> AsyncIterator[Harness]:
        parts = build(**fields)
        transport = httpx.ASGITransport(parts.app, raise_app_exceptions=False)
        async with (
            parts.app.router.lifespan_context(parts.app),
            httpx.AsyncClient(transport=transport, base_url="http://shoal") as client,
        ):
            try:
                yield Harness(
                    parts.app,
                    client,
                    parts.services,
                    parts.library,
                    parts.runner,
                    parts.gate,
                    tokenizer,
                )
            finally:
                parts.gate.error, parts.gate.delay_s = None, 0.0
                parts.gate.open()

    return start
