"""Disk, database or storage fail under the real app and library: what is in memory is served on.

Whatever fails, an upload is refused with a 503 and changes nothing, requests for other adapters
are answered, and all works again without a restart once the fault is gone.
"""

import asyncio
import errno
import os
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from sqlalchemy import make_url
from tests.adapters.databases import PostgresServer, postgres
from tests.adapters.proxies import Proxy
from tests.adapters.test_library import CANONICAL, SHAPE, WEIGHTS, adapter
from tests.adapters.test_object_store import QUICK, Flaky
from tests.server.http.conftest import Parts

from shoal.adapters.basis import BasisStore
from shoal.adapters.host_tier import HostTier
from shoal.adapters.library import AdapterLibrary
from shoal.adapters.reading import adapter_files
from shoal.adapters.registry import database as database_module
from shoal.adapters.registry.database import Database
from shoal.adapters.registry.object_store import ObjectStore
from shoal.adapters.registry.registry import Registry
from shoal.adapters.registry.store import LocalStore, Store

__all__ = ["postgres"]

pytestmark = pytest.mark.anyio

AWAY = {
    "message": "the adapter registry cannot be reached",
    "type": "server_error",
    "param": None,
    "code": "registry_error",
}


@dataclass
class House:
    """A server with a real library; adapters differ by a number."""

    client: httpx.AsyncClient
    registry: Registry
    parts: Parts
    folder: Path

    async def upload(self, name: str, number: int) -> httpx.Response:
        files = adapter_files(adapter(self.folder, number))
        sent = [("file", (name, path.read_bytes())) for name, path in files.items()]
        return await self.client.post("/v1/adapters", data={"name": name}, files=sent)

    async def ask(self, model: str) -> tuple[int, str | None]:
        """Status, and the version that answered."""
        body = {"model": model, "prompt": "hello", "max_tokens": 2}
        answer = await self.client.post("/v1/completions", json=body)
        return answer.status_code, answer.headers.get("x-shoal-adapter")

    async def refuses(self, name: str, number: int) -> None:
        """An upload is refused as what can be tried again."""
        answer = await self.upload(name, number)
        assert (answer.status_code, answer.json()["error"]) == (503, AWAY)
        assert int(answer.headers["retry-after"]) > 0


Open = Callable[..., AbstractAsyncContextManager[House]]


@pytest.fixture
def open_house(build: Callable[..., Parts], tmp_path: Path) -> Open:
    """``async with open_house(url, store) as house:``, as one process after or beside another."""

    @asynccontextmanager
    async def start(url: str, store: Store, clock: Any = None) -> AsyncIterator[House]:
        made = {} if clock is None else {"clock": clock}
        registry = Registry(Database(url), store, base_digest=SHAPE.digest, **made)
        library = AdapterLibrary(
            registry,
            shape=SHAPE,
            weight_of=WEIGHTS.__getitem__,
            canonical=CANONICAL,
            bases=BasisStore(tmp_path / "bases"),
            host=HostTier(1 << 20),
            on_basis=lambda basis: None,
            dtype=torch.float32,
            max_upload_bytes=1 << 20,
        )
        parts = build(library=library)
        transport = httpx.ASGITransport(parts.app, raise_app_exceptions=False)
        async with (
            parts.app.router.lifespan_context(parts.app),
            httpx.AsyncClient(transport=transport, base_url="http://shoal") as client,
        ):
            yield House(client, registry, parts, tmp_path)
        await asyncio.to_thread(library.close)

    return start


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/registry.db"


# ------------------------------------------------------------------------------------- the disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 512 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "shoal-test", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Use up every byte of it."""
    path = disk / "filling"

    def write_for_ever(size: int) -> None:
        with path.open("ab", buffering=0) as file:
            while file.write(b"x" * size):
                pass

    for size in (65536, 512, 1):
        with pytest.raises(OSError, match="No space left"):
            write_for_ever(size)
    return path


async def test_a_full_disk_refuses_uploads_alone(open_house: Open, small_disk: Path) -> None:
    url = f"sqlite:///{small_disk}/registry.db"
    async with open_house(url, LocalStore(small_disk / "store")) as before:
        assert (await before.upload("cold", 1)).status_code == 201
    async with open_house(url, LocalStore(small_disk / "store")) as house:
        assert (await house.upload("warm", 2)).status_code == 201
        filling = fill(small_disk)
        for name, number in (("new", 3), ("warm", 4)):
            await house.refuses(name, number)
        assert await house.ask("warm") == (200, "warm@1")
        assert await house.ask("cold") == (200, "cold@1"), "reading needs no room"
        listed = (await house.client.get("/v1/adapters")).json()["data"]
        assert [info["name"] for info in listed] == ["cold", "warm"]
        filling.unlink()
        assert (await house.upload("new", 3)).status_code == 201
        assert await house.ask("new") == (200, "new@1")
        await asyncio.to_thread(house.registry.check)


async def test_a_read_only_store_refuses_uploads_alone(
    open_house: Open, small_disk: Path, url: str
) -> None:
    def remount(mode: str) -> None:
        command = ["mount", "-o", f"remount,{mode}", str(small_disk)]
        subprocess.run(command, check=True, capture_output=True)

    async with open_house(url, LocalStore(small_disk)) as before:
        assert (await before.upload("cold", 1)).status_code == 201
    async with open_house(url, LocalStore(small_disk)) as house:
        assert (await house.upload("warm", 2)).status_code == 201
        await asyncio.to_thread(remount, "ro")
        await house.refuses("new", 3)
        assert await house.ask("warm") == (200, "warm@1")
        assert await house.ask("cold") == (200, "cold@1")
        # Names are in the database, which can be written.
        assert (await house.client.delete("/v1/adapters/cold")).status_code == 204
        await asyncio.to_thread(remount, "rw")
        assert (await house.upload("new", 3)).status_code == 201


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
async def test_a_disk_that_fails_on_writing_refuses_uploads_alone(
    open_house: Open, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """The same where nothing can be mounted."""
    async with open_house(url, LocalStore(tmp_path / "store")) as house:
        assert (await house.upload("warm", 1)).status_code == 201

        adapter(tmp_path, 2)  # made before, for that takes a disk that works

        def failing(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing)
            await house.refuses("new", 2)
        assert await house.ask("warm") == (200, "warm@1")
        assert (await house.client.get("/v1/adapters/new")).status_code == 404
        assert (await house.upload("new", 2)).status_code == 201


async def test_no_room_to_receive_an_upload_is_a_503_too(
    open_house: Open, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_house(url, LocalStore(tmp_path / "store")) as house:
        adapter(tmp_path, 1)
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "tempdir", str(tmp_path / "is not there"))
            await house.refuses("new", 1)
        with monkeypatch.context() as patch:
            opened = Path.open

            def full(path: Path, mode: str = "r", **options: Any) -> Any:
                if mode == "wb":
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return opened(path, mode, **options)

            patch.setattr(Path, "open", full)
            await house.refuses("new", 1)
        assert (await house.upload("new", 1)).status_code == 201


# ----------------------------------------------------------------------------------- the bytes


@pytest.mark.parametrize("harm", ["missing", "cut off", "other bytes"])
async def test_a_corrupt_record_fails_its_own_adapter_until_it_is_uploaded_again(
    open_house: Open, url: str, tmp_path: Path, harm: str
) -> None:
    store = LocalStore(tmp_path / "store")
    async with open_house(url, store) as house:
        assert (await house.upload("a", 1)).status_code == 201
        [path] = (p for p in (tmp_path / "store" / "records").rglob("*") if p.is_file())
        data = path.read_bytes()
        assert (await house.upload("b", 2)).status_code == 201
        if harm == "missing":
            path.unlink()
        else:
            path.write_bytes(data[:-1] if harm == "cut off" else data[:-1] + b"?")
        assert await house.ask("a") == (200, "a@1"), "in memory it is whole"
    async with open_house(url, store) as house:
        body = {"model": "a", "prompt": "hello", "max_tokens": 2}
        answer = await house.client.post("/v1/completions", json=body)
        assert answer.status_code == 500
        assert answer.json()["error"] == {**AWAY, "message": "internal error"}
        assert await house.ask("b") == (200, "b@1")
        again = await house.upload("a", 1)
        assert (again.status_code, again.json()["version"]) == (201, 1)
        assert path.read_bytes() == data
        assert await house.ask("a") == (200, "a@1")


# -------------------------------------------------------------------------------- the database


@pytest.fixture
def network(postgres: PostgresServer) -> Iterator[tuple[Proxy, str, str]]:
    """A network to an empty database; the database's URL through it, and directly."""
    direct = make_url(postgres.new_schema())
    with Proxy(f"{direct.query['host']}/.s.PGSQL.5432") as proxy:
        query = {key: value for key, value in direct.query.items() if key != "host"}
        through = direct.set(host="127.0.0.1", port=proxy.port, query=query)
        yield proxy, *(u.render_as_string(hide_password=False) for u in (through, direct))


@pytest.mark.parametrize("how", ["refusing", "stalled"])
async def test_while_the_database_is_away_what_was_used_lately_is_served(
    open_house: Open,
    network: tuple[Proxy, str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    monkeypatch.setattr(database_module, "READ_TIMEOUT_S", 3.0)
    monkeypatch.setattr(database_module, "CONNECT_TIMEOUT_S", 2)
    proxy, through, direct = network
    store = LocalStore(tmp_path / "store")
    async with open_house(through, store) as house, open_house(direct, store) as other:
        for name, number in (("a", 1), ("b", 2), ("unused", 3)):
            assert (await house.upload(name, number)).status_code == 201
        for model in ("a", "a@1", "b"):
            assert (await house.ask(model))[0] == 200
        fault = getattr(proxy, how)
        fault.set()
        await asyncio.sleep(0.1)
        for _ in range(2):
            served = await asyncio.gather(*(house.ask(m) for m in ["a", "a@1", "b"] * 8))
            assert served == [(200, "a@1"), (200, "a@1"), (200, "b@1")] * 8
        assert (await house.ask("base")) == (200, None)
        assert (await house.ask("unused")) == (503, None), "nobody knows what that means now"
        assert (await house.client.get("/v1/adapters")).status_code == 503
        assert (await house.client.delete("/v1/adapters/a")).status_code == 503
        await house.refuses("new", 4)
        # Another process still reaches the database; this one cannot know what happens there.
        assert (await other.upload("a", 5)).json()["version"] == 2
        assert (await other.client.delete("/v1/adapters/b")).status_code == 204
        assert await house.ask("a") == (200, "a@1")
        fault.clear()
        async with asyncio.timeout(60):
            while (await house.client.get("/v1/adapters")).status_code != 200:
                await asyncio.sleep(0.05)
        assert await house.ask("a") == (200, "a@2")
        assert (await house.ask("b"))[0] == 404
        assert (await house.upload("new", 4)).status_code == 201


async def test_a_stream_goes_on_while_the_database_is_away(
    open_house: Open, network: tuple[Proxy, str, str], tmp_path: Path
) -> None:
    proxy, through, _ = network
    async with open_house(through, LocalStore(tmp_path / "store")) as house:
        assert (await house.upload("a", 1)).status_code == 201
        house.parts.gate.close()
        body = {"model": "a", "prompt": "x", "max_tokens": 50, "ignore_eos": True}
        stream = asyncio.create_task(house.client.post("/v1/completions", json=body))
        async with asyncio.timeout(60):
            while house.parts.services.in_flight == 0:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
        proxy.refusing.set()
        house.parts.gate.open()
        answer = await stream
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 50


# ------------------------------------------------------------------------------ object storage


@pytest.mark.parametrize("fault", [OSError("503 SlowDown"), 60.0], ids=["failing", "slow"])
async def test_a_storage_that_fails_or_hangs_is_no_matter_for_what_is_in_memory(
    open_house: Open, url: str, fault: Any
) -> None:
    network = Flaky()
    store = ObjectStore(network, "bucket/registry", QUICK)
    async with open_house(url, store) as house:
        assert (await house.upload("cold", 1)).status_code == 201
    async with open_house(url, store) as house:
        assert (await house.upload("warm", 2)).status_code == 201
        network.faults = [fault] * 999
        # More than there are threads to wait in.
        cold = [asyncio.create_task(house.ask("cold")) for _ in range(20)]
        await asyncio.sleep(0.05)
        assert await house.ask("warm") == (200, "warm@1")
        if fault == 60.0:
            assert not any(task.done() for task in cold), "it waited for nobody"
        assert await asyncio.gather(*cold) == [(503, None)] * 20
        await house.refuses("new", 3)
        assert await house.ask("warm") == (200, "warm@1")
        network.faults = []
        assert await house.ask("cold") == (200, "cold@1")
        assert (await house.upload("new", 3)).status_code == 201


# ----------------------------------------------------------------------------------- the clock


async def test_a_clock_that_goes_backwards_changes_nothing(
    open_house: Open, url: str, tmp_path: Path
) -> None:
    now = [2_000_000_000.0]
    store = LocalStore(tmp_path / "store")
    async with open_house(url, store, clock=lambda: now[0]) as house:
        for version in (1, 2, 3):
            answer = await house.upload("a", version)
            assert (answer.status_code, answer.json()["version"]) == (201, version)
            assert await house.ask("a") == (200, f"a@{version}")
            now[0] -= 400_000_000.0
        assert (await house.client.delete("/v1/adapters/a")).status_code == 204
        answer = await house.upload("a", 1)
        assert answer.json()["version"] == 4, "numbers are not given out again"
        # The grace of what was deleted is over when as much time has passed, not before.
        assert await asyncio.to_thread(house.registry.collect) == 0
        now[0] = 2_000_000_000.0
        assert await asyncio.to_thread(house.registry.collect) == 2
    async with open_house(url, store, clock=lambda: 0.0) as house:
        assert await house.ask("a") == (200, "a@4")
        assert (await house.upload("b", 2)).status_code == 201
        assert await house.ask("b") == (200, "b@1")
