"""The store on object storage: a real S3 server on this machine, and storage that misbehaves."""

import asyncio
import hashlib
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from typing import Any

import fsspec
import httpx
import pytest
from fsspec.asyn import AsyncFileSystem
from tests.adapters.proxies import Proxy

from shoal.adapters.registry.errors import RecordDamaged, RegistryUnavailable
from shoal.adapters.registry.object_store import ObjectStore
from shoal.adapters.registry.retrying import Patience, retried
from shoal.adapters.registry.store import Store, open_store

QUICK = Patience(attempts=4, first_wait_s=0.001, longest_wait_s=0.002, call_s=0.2)
RECORD = b"some bytes of a record" * 50


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


DIGEST = digest_of(RECORD)


class Flaky(AsyncFileSystem):  # type: ignore[misc]
    """Objects in memory behind a network that does what a test says.

    Attributes:
        faults: what happens to the next calls: an exception to raise, seconds to take, or a
            function of the bytes that were read.
        calls: names of the methods called.
    """

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.objects: dict[str, bytes] = {}
        self.faults: list[Any] = []
        self.calls: list[str] = []

    async def _step(self, name: str, data: Any = None) -> Any:
        self.calls.append(name)
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        if isinstance(fault, float):
            await asyncio.sleep(fault)
        if callable(fault) and data is not None:
            return fault(data)
        return data

    async def _pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        await self._step("pipe_file")
        self.objects[path] = value

    async def _cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        if path not in self.objects:
            await self._step("cat_file")
            raise FileNotFoundError(path)
        return bytes(await self._step("cat_file", self.objects[path][start:end]))

    async def _exists(self, path: str, **_: Any) -> bool:
        await self._step("exists")
        return path in self.objects

    async def _rm_file(self, path: str, **_: Any) -> None:
        await self._step("rm_file")
        if self.objects.pop(path, None) is None:
            raise FileNotFoundError(path)

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        await self._step("info")
        if path not in self.objects:
            raise FileNotFoundError(path)
        return {"name": path, "size": len(self.objects[path]), "type": "file"}

    async def _ls(self, path: str, detail: bool = True, **_: Any) -> Any:
        await self._step("ls")
        names = [name for name in self.objects if name.startswith(path + "/")]
        return [await self._info(name) for name in names] if detail else names


@pytest.fixture
def network() -> Flaky:
    return Flaky()


@pytest.fixture
def store(network: Flaky) -> ObjectStore:
    return ObjectStore(network, "bucket/registry", QUICK)


FAILURES = [
    ConnectionResetError("reset"),
    TimeoutError("slow"),
    OSError("503 SlowDown"),
    RuntimeError("whatever a client raises"),
]


@pytest.mark.parametrize("failure", FAILURES)
def test_failures_that_pass_are_not_seen(
    network: Flaky, store: ObjectStore, failure: Exception
) -> None:
    for call in (
        lambda: store.put(DIGEST, RECORD),
        lambda: store.get(DIGEST),
        lambda: store.exists(DIGEST),
        lambda: store.put_many([(DIGEST, RECORD)]),
        lambda: store.packs.refresh(),
        lambda: store.delete(DIGEST),
    ):
        network.faults = [failure, failure, failure]
        call()
    assert store.get(DIGEST) == RECORD  # from the pack


@pytest.mark.parametrize("failure", FAILURES)
def test_failures_that_stay_are_typed_and_end(
    network: Flaky, store: ObjectStore, failure: Exception
) -> None:
    network.faults = [failure] * 99
    with pytest.raises(RegistryUnavailable, match="store 'bucket/registry/records/"):
        store.put(DIGEST, RECORD)
    assert network.calls == ["pipe_file"] * 4
    with pytest.raises(RegistryUnavailable):
        store.get(DIGEST)
    network.faults = []
    assert not store.exists(DIGEST)
    store.put(DIGEST, RECORD)
    assert store.get(DIGEST) == RECORD


def test_a_refusal_is_not_tried_again(network: Flaky, store: ObjectStore) -> None:
    network.faults = [PermissionError("read-only bucket")]
    with pytest.raises(RegistryUnavailable, match="read-only bucket"):
        store.put(DIGEST, RECORD)
    assert network.calls == ["pipe_file"]


def test_a_call_that_hangs_is_given_up_and_tried_again(network: Flaky, store: ObjectStore) -> None:
    store.put(DIGEST, RECORD)
    network.faults = [60.0]
    begin = time.monotonic()
    assert store.get(DIGEST) == RECORD
    network.faults = [60.0] * 9
    with pytest.raises(RegistryUnavailable, match="TimeoutError"):
        store.put(DIGEST, RECORD)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    "harm", [lambda data: data[:10], lambda data: b"", lambda data: b"x" + data[1:]]
)
def test_partial_and_wrong_reads_are_read_again(
    network: Flaky, store: ObjectStore, harm: Any
) -> None:
    store.put(DIGEST, RECORD)
    network.faults = [harm, harm]
    assert store.get(DIGEST) == RECORD
    network.faults = [harm] * 9
    with pytest.raises(RecordDamaged, match="is damaged"):
        store.get(DIGEST)


@pytest.mark.parametrize("harm", [lambda data: data[:10], lambda data: b"x" + data[1:]])
def test_so_are_those_of_packs(network: Flaky, store: ObjectStore, harm: Any) -> None:
    store.put_many([(DIGEST, RECORD)])
    assert store.get(DIGEST) == RECORD  # the index is known from here on
    network.faults = [None, harm]  # no record of its own, then the frame
    assert store.get(DIGEST) == RECORD


def test_wrong_bytes_in_the_storage_are_mended_by_the_same_upload(
    network: Flaky, store: ObjectStore
) -> None:
    store.put(DIGEST, RECORD)
    [path] = network.objects
    network.objects[path] = b"other bytes"
    with pytest.raises(RecordDamaged):
        store.get(DIGEST)
    store.put(DIGEST, RECORD)
    assert store.get(DIGEST) == RECORD


def test_what_is_missing_is_typed_at_once(network: Flaky, store: ObjectStore) -> None:
    with pytest.raises(RecordDamaged, match="is missing"):
        store.get(DIGEST)
    store.delete(DIGEST)


def test_waits_grow_to_a_bound_and_differ() -> None:
    patience = Patience(attempts=8, first_wait_s=0.1, longest_wait_s=1.0)
    waits: list[float] = []
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        retried(fail, patience, waits.append)
    assert len(calls) == 8
    for wait, most in zip(waits, [0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0], strict=True):
        assert most / 2 <= wait <= most


# ---------------------------------------------------------------------------------- a real S3


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    """A bucket of an S3 server on this machine."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    endpoint = f"http://127.0.0.1:{port}"
    kept = dict(os.environ)
    os.environ.update(
        AWS_ENDPOINT_URL=endpoint,
        AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY="test",
        AWS_DEFAULT_REGION="us-east-1",
        NO_PROXY="127.0.0.1",
    )
    try:
        until = time.monotonic() + 60
        while True:
            try:
                httpx.put(f"{endpoint}/registry", trust_env=False).raise_for_status()
                break
            except httpx.TransportError:
                assert time.monotonic() < until, "no S3 server"
                time.sleep(0.2)
        yield "s3://registry"
    finally:
        server.terminate()
        server.wait()
        os.environ.clear()
        os.environ.update(kept)
        fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def s3(s3_url: str) -> Store:
    return open_store(f"{s3_url}/{uuid.uuid4().hex}")


def test_s3_keeps_records_and_packs(s3: Store) -> None:
    assert not s3.exists(DIGEST)
    with pytest.raises(RecordDamaged, match="missing"):
        s3.get(DIGEST)
    s3.put(DIGEST, RECORD)
    s3.put(DIGEST, RECORD)
    assert s3.get(DIGEST) == RECORD
    assert s3.exists(DIGEST)
    [(digest, written)] = s3.records()
    assert digest == DIGEST
    assert abs(written - time.time()) < 60
    many = [(digest_of(b"%d" % n), b"%d" % n) for n in range(20)]
    name = s3.put_many(many)
    assert [s3.get(digest) for digest, _ in many] == [data for _, data in many]
    assert abs(s3.pack_time(name) - time.time()) < 60
    assert len(s3.packs.indexes()[name].keys) == 20
    s3.delete(DIGEST)
    s3.delete(DIGEST)
    assert not s3.exists(DIGEST)


def test_s3_retires_what_is_old_and_nothing_else(s3: Store) -> None:
    s3.put(DIGEST, RECORD)
    name = s3.put_many([(digest_of(b"1"), b"1")])
    assert not s3.retire_record(DIGEST, time.time() - 60)
    assert not s3.retire_pack(name, time.time() - 60)
    assert s3.retire_record(DIGEST, time.time() + 60)
    assert s3.retire_pack(name, time.time() + 60)
    assert not s3.exists(DIGEST)
    assert not s3.exists(digest_of(b"1"))


def test_an_s3_server_that_is_gone_is_typed(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    try:
        store = open_store(f"{s3_url}/gone")
        assert isinstance(store, ObjectStore)
        store._patience = QUICK
        with pytest.raises(RegistryUnavailable):
            store.put(DIGEST, RECORD)
    finally:
        fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_an_s3_server_that_stops_answering_is_typed_and_found_again(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])
    clear = fsspec.get_filesystem_class("s3").clear_instance_cache
    with Proxy(("127.0.0.1", port)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        clear()
        try:
            store = open_store(f"{s3_url}/{uuid.uuid4().hex}")
            assert isinstance(store, ObjectStore)
            store.put(DIGEST, RECORD)
            store._patience = Patience(attempts=2, first_wait_s=0.01, call_s=0.5)
            for fault in (proxy.stalled, proxy.refusing):
                fault.set()
                for call in (lambda: store.get(DIGEST), lambda: store.put(DIGEST, RECORD)):
                    with pytest.raises(RegistryUnavailable):
                        call()
                fault.clear()
                store._patience = Patience()
                assert store.get(DIGEST) == RECORD
                store._patience = QUICK
        finally:
            clear()


def test_a_bucket_that_is_not_there_is_typed(s3_url: str) -> None:
    store = open_store("s3://no-such-bucket/x")
    with pytest.raises(RegistryUnavailable, match="no such bucket"):
        store.put(DIGEST, RECORD)
