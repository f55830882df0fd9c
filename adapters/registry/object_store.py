"""``ObjectStore``: the store on an object storage (S3, GCS, Azure, …) through fsspec.

Needs of the storage that writing one object is atomic and that what was written is read; S3 and
its like promise both. Every call has a time limit and is tried again a few times.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec.asyn

from shoal.adapters.registry import stored
from shoal.adapters.registry.errors import RecordDamaged, RegistryError, RegistryUnavailable
from shoal.adapters.registry.packs import SUFFIX, Packs, pack_chunks, pack_name, read_packed
from shoal.adapters.registry.retrying import Patience, retried

_HEX = "0123456789abcdef"
# Limit on one try with a whole file: 350 MB of basis for an 8B model, at 1 MB/s.
FILE_S = 600.0


def url_options(url: str) -> dict[str, Any]:
    """What to open the filesystem of ``url`` with, beside what its own configuration says.

    S3: this module repeats calls, so botocore does not; endpoint and credentials come from the
    usual places (``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, ``~/.aws``, an instance's role).
    """
    if not url.startswith(("s3://", "s3a://")):
        return {}
    config = {"connect_timeout": 5, "read_timeout": 20, "retries": {"max_attempts": 0}}
    return {"use_listings_cache": False, "config_kwargs": config}


class ObjectStore:
    """A store on any fsspec filesystem whose single-object writes are atomic.

    Limit: ``retire_record`` looks at an object's time and then deletes it. Bytes that are put
    between the two are lost; what it deletes is old and nobody's, so a put of the very same bytes
    must come within that millisecond.

    Args:
        filesystem: an ``fsspec.AbstractFileSystem``. Time limits hold for asynchronous ones, which
            those of object stores are.
        root: path inside it.
        patience: how long to wait and how often to try.
    """

    def __init__(self, filesystem: Any, root: str, patience: Patience | None = None) -> None:
        self._filesystem = filesystem
        self._root = root.rstrip("/")
        self._patience = patience or Patience()
        self.packs = Packs(self._pack_names, self._read_pack)

    def put(self, digest: str, data: bytes) -> None:
        """See ``Store``. Always writes: the write costs what the check would."""
        self._write(self._path(digest), stored.encode(digest, data))

    def put_many(self, records: Sequence[tuple[str, bytes]]) -> str:
        """See ``Store``. The pack is built in memory."""
        name = pack_name(records)
        self._write(f"{self._root}/packs/{name}", b"".join(pack_chunks(records)))
        self.packs.forget(name)
        return name

    def get(self, digest: str) -> bytes:
        """See ``Store``. Bytes that are not what they should be are read again before that."""
        return self._get(digest, stored.decode)

    def get_stored(self, digest: str) -> bytes:
        """See ``Store``; patient like ``get``."""
        return self._get(digest, stored.verified)

    def exists(self, digest: str) -> bool:
        """See ``Store``."""
        found = self._call("exists", self._path(digest))
        return bool(found) or self.packs.holds(digest)

    def delete(self, digest: str) -> None:
        """See ``Store``."""
        with contextlib.suppress(FileNotFoundError):
            self._call("rm_file", self._path(digest))

    def records(self) -> Iterator[tuple[str, float]]:
        """See ``Store``. Lists one of 256 folders at a time."""
        for folder in (a + b for a in _HEX for b in _HEX):
            try:
                found = self._call("find", f"{self._root}/records/{folder}", detail=True)
            except FileNotFoundError:
                continue
            for path, info in found.items():
                digest = str(path).rpartition("/")[2]
                if stored.is_digest(digest):
                    yield digest, _written(info)

    def retire_record(self, digest: str, before: float) -> bool:
        """See ``Store``."""
        return self._retire(self._path(digest), before)

    def pack_time(self, name: str) -> float:
        """See ``Store``."""
        return _written(self._call("info", f"{self._root}/packs/{name}"))

    def retire_pack(self, name: str, before: float) -> bool:
        """See ``Store``."""
        self.packs.forget(name)
        return self._retire(f"{self._root}/packs/{name}", before)

    def leftovers(self, before: float) -> list[Path]:
        """See ``Store``. Parts of interrupted multipart uploads are for the bucket's rules."""
        return []

    def files(self, folder: str) -> list[str]:
        """Names of the files in a folder of the store."""
        try:
            found = self._call("ls", f"{self._root}/{folder}", detail=False)
        except FileNotFoundError:
            return []
        return [str(path).rpartition("/")[2] for path in found]

    def send_file(self, name: str, source: Path) -> None:
        """Keep a copy of ``source``, which may be large: durable when this returns."""
        path = f"{self._root}/{name}"
        try:
            self._call("put_file", str(source), path, call_s=FILE_S)
        except FileNotFoundError as error:
            raise RegistryUnavailable(f"store {path!r}: no such bucket ({error})") from error

    def fetch_file(self, name: str, target: Path) -> None:
        """Write a file of the store to ``target``. FileNotFoundError when there is none."""
        self._call("get_file", f"{self._root}/{name}", str(target), call_s=FILE_S)

    def _retire(self, path: str, before: float) -> bool:
        try:
            if _written(self._call("info", path)) >= before:
                return False
            self._call("rm_file", path)
        except FileNotFoundError:
            return False
        return True

    def _write(self, path: str, data: bytes) -> None:
        try:
            self._call("pipe_file", path, data)
        except FileNotFoundError as error:
            raise RegistryUnavailable(f"store {path!r}: no such bucket ({error})") from error

    def _get(self, digest: str, form: stored.Form) -> bytes:
        for _ in range(self._patience.attempts - 1):
            with contextlib.suppress(RecordDamaged):
                return self._get_once(digest, form)
        return self._get_once(digest, form)

    def _get_once(self, digest: str, form: stored.Form) -> bytes:
        path = self._path(digest)
        try:
            data = self._call("cat_file", path)
        except FileNotFoundError:
            return read_packed(self.packs, digest, path, form)
        return form(digest, data, path)

    def _path(self, digest: str) -> str:
        return "/".join((self._root, "records", *stored.key(digest)))

    def _pack_names(self) -> list[str]:
        try:
            found = self._call("ls", f"{self._root}/packs", detail=False)
        except FileNotFoundError:
            return []
        names = (str(path).rpartition("/")[2] for path in found)
        return [name for name in names if name.endswith(SUFFIX)]

    def _read_pack(self, name: str, start: int, end: int | None) -> bytes:
        path = f"{self._root}/packs/{name}"
        if start < 0 or end is None:
            size = int(self._call("info", path)["size"])
            start = max(size + start, 0) if start < 0 else start
            end = size if end is None else end
        data: bytes = self._call("cat_file", path, start=start, end=end)
        return data

    def _call(
        self, name: str, path: str, *args: Any, call_s: float | None = None, **kwargs: Any
    ) -> Any:
        """A method of the filesystem, with a time limit (by default ``Patience``'s), tried again.

        Raises:
            FileNotFoundError: there is no such object.
            RegistryUnavailable: anything else.
        """

        def call() -> Any:
            if not getattr(self._filesystem, "async_impl", False):
                return getattr(self._filesystem, name)(path, *args, **kwargs)
            method = getattr(self._filesystem, f"_{name}")

            async def limited() -> Any:
                limit_s = self._patience.call_s if call_s is None else call_s
                return await asyncio.wait_for(method(path, *args, **kwargs), limit_s)

            return fsspec.asyn.sync(self._filesystem.loop, limited)

        try:
            return retried(call, self._patience)
        except (FileNotFoundError, RegistryError, AssertionError):
            raise
        except Exception as error:  # clients of storages raise what they like
            said = str(error) or type(error).__name__
            raise RegistryUnavailable(f"store {path!r}: {said}") from error


def _written(info: Any) -> float:
    """Unix time at which an object was written; now when the storage does not say."""
    for key in ("LastModified", "last_modified", "mtime", "created"):
        value = info.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
    return time.time()
