"""Uploads at a steady rate, each used by a request as soon as the server has taken it.

Runs in a process of its own (``in_process``), so that making and sending them does not delay the
streams that are being watched.
"""

import asyncio
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from shoal.loadtests.client import ServerError, connect
from shoal.loadtests.uploads import FILES, error_text
from shoal.loadtests.variants import variant

# Uploads under way; beyond it, what is due waits. (A server refuses more than 32 of one client.)
AT_ONCE = 24
ERRORS_KEPT = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadPlan:
    """What to upload and when.

    Attributes:
        folders: of the adapters that are varied, in turns. Not their files: to send those to the
            process would hold up the one that watches the streams.
        prefix: of the names; the number follows.
        first: number of the first one. No two with one number are the same adapter.
        begin_s, rate, count: when the first is due (``time.monotonic``), how many are a second, and
            how many in all. A rate of 0 is as fast as the server takes them.
        prompt: what a request that uses one asks; none is sent when it is empty.
    """

    base_url: str
    api_key: str | None
    folders: tuple[Path, ...]
    prefix: str
    first: int
    count: int
    begin_s: float = 0.0
    rate: float = 0.0
    prompt: Sequence[int] = ()


@dataclass(slots=True)
class UploadsDone:
    """What became of them.

    Attributes:
        upload_ms: from sending one to its 201.
        use_ms: from that to the answer of the request that used it.
        usable: that answer came from the version that the 201 named.
        seconds: from the first that was due to the last 201.
        errors: the first few.
    """

    upload_ms: list[float] = field(default_factory=list)
    use_ms: list[float] = field(default_factory=list)
    usable: int = 0
    failed: int = 0
    seconds: float = 0.0
    names: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def note_error(self, text: str) -> None:
        """One of them failed."""
        self.failed += 1
        if len(self.errors) < ERRORS_KEPT:
            self.errors.append(text)


@functools.cache
def files_of(folders: tuple[Path, ...]) -> list[dict[str, bytes]]:
    """The files of each adapter, by name; read once by each process."""
    return [{name: (folder / name).read_bytes() for name in FILES} for folder in folders]


def in_process(plan: UploadPlan) -> UploadsDone:
    """``upload_steadily`` with a client of its own; for another process to call."""

    async def go() -> UploadsDone:
        async with connect(plan.base_url, plan.api_key) as client:
            return await upload_steadily(client, plan)

    return asyncio.run(go())


def delete_in_process(base_url: str, api_key: str | None, names: Sequence[str]) -> int:
    """Delete these adapters; returns how many the server refused to."""

    async def go() -> int:
        async with connect(base_url, api_key) as client:
            answers = [await client.delete(f"/v1/adapters/{name}") for name in names]
            return sum(not answer.is_success for answer in answers)

    return asyncio.run(go())


async def upload_steadily(
    client: httpx.AsyncClient,
    plan: UploadPlan,
    clock: Callable[[], float] = time.monotonic,
) -> UploadsDone:
    """Upload ``plan.count`` adapters at their times, and use each."""
    done = UploadsDone()
    gate = asyncio.Semaphore(AT_ONCE)
    begin = plan.begin_s or clock()

    async def one(index: int) -> None:
        due = begin + index / plan.rate if plan.rate else begin
        await asyncio.sleep(max(0.0, due - clock()))
        try:
            async with gate:
                version = await _upload(client, plan, index, done, clock)
            done.seconds = max(done.seconds, clock() - begin)
            if plan.prompt:
                await _use(client, plan, version, done, clock)
        except (httpx.HTTPError, ServerError) as problem:
            done.note_error(f"{type(problem).__name__}: {problem}")

    await asyncio.gather(*(one(index) for index in range(plan.count)))
    return done


async def _upload(
    client: httpx.AsyncClient,
    plan: UploadPlan,
    index: int,
    done: UploadsDone,
    clock: Callable[[], float],
) -> str:
    """Returns ``name@version``."""
    number = plan.first + index
    name = f"{plan.prefix}{number}"
    adapters = files_of(plan.folders)
    files = variant(adapters[index % len(adapters)], number)
    parts = [("file", (file, data)) for file, data in files.items()]
    sent = clock()
    answer = await client.post("/v1/adapters", data={"name": name}, files=parts)
    if answer.status_code != 201:
        raise ServerError(f"upload of {name}: {error_text(answer)}")
    done.upload_ms.append((clock() - sent) * 1e3)
    done.names.append(name)
    return f"{name}@{answer.json()['version']}"


async def _use(
    client: httpx.AsyncClient,
    plan: UploadPlan,
    version: str,
    done: UploadsDone,
    clock: Callable[[], float],
) -> None:
    name = version.partition("@")[0]
    body = {"model": name, "prompt": list(plan.prompt), "max_tokens": 1, "temperature": 0.0}
    sent = clock()
    answer = await client.post("/v1/completions", json=body)
    done.use_ms.append((clock() - sent) * 1e3)
    if answer.status_code != 200:
        raise ServerError(f"use of {name}: {error_text(answer)}")
    used = answer.headers.get("x-shoal-adapter")
    if used != version:
        raise ServerError(f"use of {name}: the answer is of {used}, must be of {version}")
    done.usable += 1
