"""Uploads folders of adapters to a server before a run, and says how long they took."""

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from shoal.loadtests.client import ServerError

AT_ONCE = 8
FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadFigures:
    """How long uploads took, each from sending it to the answer.

    Attributes:
        count: all of them.
        bytes: of their files.
        at_once: how many were under way at a time, but for the first.
        first_ms: of the first, which went alone: it may wait for what the server does only once.
        p50_ms, max_ms: of the others; None if there were none.
        per_s: the others, by the time that they took together.
    """

    count: int
    bytes: int
    at_once: int
    first_ms: float
    p50_ms: float | None
    max_ms: float | None
    per_s: float | None

    def __str__(self) -> str:
        text = f"uploads: first {self.first_ms:.0f} ms"
        if self.per_s is None:
            return text
        return (
            f"{text}; {self.count - 1} more, {self.at_once} at a time: "
            f"median {self.p50_ms:.0f} ms, worst {self.max_ms:.0f} ms, {self.per_s:.1f} per second"
        )


def adapter_folders(directory: Path) -> list[Path]:
    """The folders in ``directory``, by name.

    Raises:
        ValueError: it has none, or one of them lacks a file of an adapter.
    """
    try:
        folders = sorted(path for path in directory.iterdir() if path.is_dir())
    except OSError as problem:
        raise ValueError(f"--upload cannot be read: {problem}") from problem
    if not folders:
        raise ValueError(f"--upload {directory} has no folders of adapters")
    for folder in folders:
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"--upload: {folder} has no {' and no '.join(missing)}")
    return folders


async def upload_all(
    client: httpx.AsyncClient,
    folders: Sequence[Path],
    on_done: Callable[[], object] = lambda: None,
) -> UploadFigures:
    """Upload every folder under its own name, the first alone and then ``AT_ONCE`` at a time.

    Raises:
        ServerError: one was not taken; names the folder and gives the server's answer.
    """
    size = 0
    took: list[float] = []
    waiting = iter(folders)

    async def work(most: int) -> None:
        nonlocal size
        while most and (folder := next(waiting, None)):
            most -= 1
            files = {name: (folder / name).read_bytes() for name in FILES}
            size += sum(map(len, files.values()))
            begin = time.perf_counter()
            await _upload(client, folder, files)
            took.append((time.perf_counter() - begin) * 1e3)
            on_done()

    await work(1)
    begin = time.perf_counter()
    workers = [asyncio.create_task(work(len(folders))) for _ in range(AT_ONCE)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:  # what is left when one has failed
            worker.cancel()
    seconds = time.perf_counter() - begin
    first, *others = took
    return UploadFigures(
        count=len(took),
        bytes=size,
        at_once=AT_ONCE,
        first_ms=first,
        p50_ms=statistics.median(others) if others else None,
        max_ms=max(others, default=None),
        per_s=len(others) / seconds if others else None,
    )


async def _upload(client: httpx.AsyncClient, folder: Path, files: dict[str, bytes]) -> None:
    parts = [("file", (name, data)) for name, data in files.items()]
    try:
        answer = await client.post("/v1/adapters", data={"name": folder.name}, files=parts)
    except httpx.HTTPError as problem:
        raise ServerError(f"upload of {folder}: {type(problem).__name__}: {problem}") from problem
    if not answer.is_success:
        raise ServerError(f"upload of {folder}: {error_text(answer)}")


def error_text(answer: httpx.Response) -> str:
    """The status and what the server said."""
    try:
        message = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = answer.text
    return f"HTTP {answer.status_code}: {message[:500]}"
