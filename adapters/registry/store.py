"""The store: adapters' bytes by the sha256 of their content.

Owns where bytes lie and that they are what their digest says. Knows no names and no adapters.
Bytes never change, so a reader needs no lock, and storing the same bytes twice is one object.

::

    <store>/records/ab/cd/abcd…   one record
    <store>/temporary/            records being written (local stores only)
    <store>/bases/                shared bases, kept by ``shoal.adapters.basis.BasisStore``
"""

import atexit
import contextlib
import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import fsspec

from shoal.adapters.registry.database import sqlite_file
from shoal.adapters.registry.errors import RecordDamaged, RegistryUnavailable

_DIGEST = re.compile(r"[0-9a-f]{64}")
# A writer needs seconds; what is older was left by one that died.
_LEFTOVER_AGE_S = 24 * 3600.0

log = logging.getLogger(__name__)


class Store(Protocol):
    """Bytes by digest (sha256, hex); thread-safe, and shared with other processes.

    Every method raises RegistryUnavailable when the storage does not answer.
    """

    def put(self, digest: str, data: bytes) -> None:
        """Keep ``data``: whole and durable when this returns, absent when it does not."""
        ...

    def get(self, digest: str) -> bytes:
        """The bytes of ``digest``, verified.

        Raises:
            RecordDamaged: they are missing, or are other bytes.
        """
        ...

    def exists(self, digest: str) -> bool:
        """Whether something is stored as ``digest``; it is not verified."""
        ...

    def delete(self, digest: str) -> None:
        """Forget ``digest``; nothing happens when it is absent."""
        ...


@dataclass(frozen=True, slots=True)
class Places:
    """Where a registry keeps what is not in its database.

    Attributes:
        store_url: fsspec URL for ``open_store``.
        bases: folder of the shared bases.
    """

    store_url: str
    bases: Path


def places(registry_url: str, store_url: str | None = None) -> Places:
    """Where the records and bases of a registry lie.

    Args:
        registry_url: SQLAlchemy URL of the catalog.
        store_url: fsspec URL of the store. By default the folder ``<registry file>.store`` beside
            a SQLite file; for ``sqlite://`` a folder that is removed when the process ends.

    Limit: bases are local files. With a store that is not, they lie in ``<registry file>.bases``.

    Raises:
        RegistryUnavailable: neither says where to keep files.
    """
    file = sqlite_file(registry_url)
    if store_url is None:
        if file is not None:
            folder = file.absolute().with_name(file.name + ".store")
        elif registry_url.startswith("sqlite"):
            folder = Path(tempfile.mkdtemp(prefix="shoal-store-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        else:
            raise RegistryUnavailable(
                "a registry that is not a SQLite file has no default store: give --store a URL"
            )
        return Places(str(folder), folder / "bases")
    filesystem, root = _filesystem(store_url)
    if _is_local(filesystem):
        return Places(store_url, Path(root) / "bases")
    if file is None:
        raise RegistryUnavailable(
            f"store {store_url!r} is not a folder, and the registry is not a SQLite file: there is "
            "no place for shared bases"
        )
    return Places(store_url, file.absolute().with_name(file.name + ".bases"))


def open_store(url: str) -> Store:
    """The store behind an fsspec URL; a plain path or ``file://`` is a local folder.

    Raises:
        RegistryUnavailable: no such kind of storage, or the folder cannot be made.
    """
    filesystem, root = _filesystem(url)
    if _is_local(filesystem):
        return LocalStore(Path(root))
    return ObjectStore(filesystem, root)


class LocalStore:
    """A store in a folder."""

    def __init__(self, folder: Path) -> None:
        self._records = folder / "records"
        self._temporary = folder / "temporary"
        with _translated(str(folder)):
            self._records.mkdir(parents=True, exist_ok=True)
            self._temporary.mkdir(exist_ok=True)
            _sync_folder(folder)
            self._remove_leftovers()

    def put(self, digest: str, data: bytes) -> None:
        """See ``Store``. A damaged record is replaced."""
        assert hashlib.sha256(data).hexdigest() == digest, "the digest is not that of the data"
        path = self._path(digest)
        with _translated(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self._is_intact(path, digest):
                self._write(path, data)
            # Also when the record was there: whoever wrote it may not have come this far.
            for folder in (path.parent, path.parent.parent, self._records):
                _sync_folder(folder)

    def get(self, digest: str) -> bytes:
        """See ``Store``."""
        path = self._path(digest)
        with _translated(str(path)):
            try:
                data = path.read_bytes()
            except FileNotFoundError as error:
                raise _missing(digest, str(path)) from error
        return _verified(data, digest, str(path))

    def exists(self, digest: str) -> bool:
        """See ``Store``."""
        return self._path(digest).is_file()

    def delete(self, digest: str) -> None:
        """See ``Store``."""
        path = self._path(digest)
        with _translated(str(path)):
            path.unlink(missing_ok=True)
            if path.parent.is_dir():
                _sync_folder(path.parent)

    def _path(self, digest: str) -> Path:
        # Two levels of 256 folders: 15 files in each for a million records.
        return self._records.joinpath(*_key(digest))

    def _is_intact(self, path: Path, digest: str) -> bool:
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == digest
        except FileNotFoundError:
            return False

    def _write(self, path: Path, data: bytes) -> None:
        """Write ``path`` in one step: a reader sees all of it or nothing, whatever stops us."""
        handle, name = tempfile.mkstemp(dir=self._temporary, prefix=path.name[:16] + ".")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise

    def _remove_leftovers(self) -> None:
        for path in self._temporary.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process cleans too
                if time.time() - path.stat().st_mtime > _LEFTOVER_AGE_S:
                    log.info("removing an unfinished record path=%s", path)
                    path.unlink()


class ObjectStore:
    """A store on any other fsspec filesystem whose single-object writes are atomic (S3, GCS, …).

    Args:
        filesystem: an ``fsspec.AbstractFileSystem``.
        root: path inside it.
    """

    def __init__(self, filesystem: Any, root: str) -> None:
        self._filesystem = filesystem
        self._root = root.rstrip("/")

    def put(self, digest: str, data: bytes) -> None:
        """See ``Store``. Always writes: the write costs what the check would."""
        assert hashlib.sha256(data).hexdigest() == digest, "the digest is not that of the data"
        path = self._path(digest)
        with _translated(path):
            self._filesystem.pipe_file(path, data)

    def get(self, digest: str) -> bytes:
        """See ``Store``."""
        path = self._path(digest)
        with _translated(path):
            try:
                data: bytes = self._filesystem.cat_file(path)
            except FileNotFoundError as error:
                raise _missing(digest, path) from error
        return _verified(data, digest, path)

    def exists(self, digest: str) -> bool:
        """See ``Store``."""
        path = self._path(digest)
        with _translated(path):
            return bool(self._filesystem.exists(path))

    def delete(self, digest: str) -> None:
        """See ``Store``."""
        path = self._path(digest)
        with _translated(path), contextlib.suppress(FileNotFoundError):
            self._filesystem.rm_file(path)

    def _path(self, digest: str) -> str:
        return "/".join((self._root, "records", *_key(digest)))


def _key(digest: str) -> tuple[str, str, str]:
    assert _DIGEST.fullmatch(digest), f"not a sha256 in hex: {digest!r}"
    return digest[:2], digest[2:4], digest


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        filesystem, root = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError, OSError) as error:
        raise RegistryUnavailable(f"store {url!r}: {error}") from error
    return filesystem, str(root)


def _is_local(filesystem: Any) -> bool:
    protocol = filesystem.protocol
    return "file" in ((protocol,) if isinstance(protocol, str) else protocol)


def _sync_folder(folder: Path) -> None:
    """Make names created or removed in ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _translated(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RegistryUnavailable(f"store {where!r}: {error}") from error


def _missing(digest: str, where: str) -> RecordDamaged:
    return RecordDamaged(f"record {digest} is missing from the store ({where})")


def _verified(data: bytes, digest: str, where: str) -> bytes:
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise RecordDamaged(f"record {digest} is damaged: its bytes have sha256 {found} ({where})")
    return data
