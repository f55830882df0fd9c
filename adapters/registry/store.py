"""The store: adapters' bytes by the sha256 of their content.

Owns where bytes lie and that they are what their digest says. Knows no names and no adapters.
Bytes never change, so a reader needs no lock, and storing the same bytes twice is one object.

::

    <store>/records/ab/cd/abcd…   one record (``stored.py``)
    <store>/packs/….pack          many records (``packs.py``)
    <store>/temporary/            files being written (local stores only)
    <store>/bases/                shared bases, kept by ``shoal.adapters.basis.BasisStore``
"""

import atexit
import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import fsspec
import platformdirs

from shoal.adapters.registry import stored
from shoal.adapters.registry.database import sqlite_file
from shoal.adapters.registry.errors import RecordDamaged, RegistryUnavailable
from shoal.adapters.registry.object_store import ObjectStore, url_options
from shoal.adapters.registry.packs import SUFFIX, Packs, pack_chunks, pack_name, read_packed

# A writer needs seconds; what is older was left by one that died.
_LEFTOVER_AGE_S = 24 * 3600.0

log = logging.getLogger(__name__)


class Store(Protocol):
    """Bytes by digest (sha256, hex); thread-safe, and shared with other processes.

    Every method raises RegistryUnavailable when the storage does not answer or refuses.
    """

    packs: Packs

    def put(self, digest: str, data: bytes) -> None:
        """Keep ``data``: whole and durable when this returns, absent when it does not.

        Bytes that are there already count as new from now on: see ``retire_record``.
        """
        ...

    def put_many(self, records: Sequence[tuple[str, bytes]]) -> str:
        """Keep all of these as one pack, or none of them; returns its name.

        Args:
            records: digest and stored bytes (``stored.encode``), which the caller has verified.

        Raises:
            ValueError: more than a pack holds.
        """
        ...

    def get(self, digest: str) -> bytes:
        """The bytes of ``digest``, verified.

        Raises:
            RecordDamaged: they are missing, or are other bytes.
        """
        ...

    def get_stored(self, digest: str) -> bytes:
        """As ``get``, but what ``stored.encode`` gives for them: what ``put_many`` takes."""
        ...

    def exists(self, digest: str) -> bool:
        """Whether something is stored as ``digest``; it is not verified."""
        ...

    def delete(self, digest: str) -> None:
        """Forget ``digest``; nothing happens when it is absent.

        What lies in a pack stays until ``doctor`` rewrites the pack.
        """
        ...

    def records(self) -> Iterator[tuple[str, float]]:
        """Digest and unix time of writing of every record outside packs, in no order."""
        ...

    def retire_record(self, digest: str, before: float) -> bool:
        """Delete a record outside packs unless it was put after ``before`` (unix time)."""
        ...

    def pack_time(self, name: str) -> float:
        """Unix time at which a pack was last put; FileNotFoundError when it is gone."""
        ...

    def retire_pack(self, name: str, before: float) -> bool:
        """Delete a pack unless it, or a record that is in it, was put after ``before``."""
        ...

    def leftovers(self, before: float) -> list[Path]:
        """Files of writers that died before ``before``; nobody reads them, any may be deleted."""
        ...


@dataclass(frozen=True, slots=True)
class Places:
    """Where a registry keeps what is not in its database.

    Attributes:
        store_url: fsspec URL for ``open_store``.
        bases: folder of the shared bases; see ``shared_bases.py``.
    """

    store_url: str
    bases: Path


def places(registry_url: str, store_url: str | None = None) -> Places:
    """Where the records and bases of a registry lie.

    Args:
        registry_url: SQLAlchemy URL of the catalog.
        store_url: fsspec URL of the store. By default the folder ``<registry file>.store`` beside
            a SQLite file; for ``sqlite://`` a folder that is removed when the process ends.

    With a store that is not a folder, the bases lie in ``<registry file>.bases``, or in the user's
    cache when the registry is not a file; the store has copies.

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
        key = hashlib.sha256(store_url.encode()).hexdigest()[:16]
        return Places(store_url, platformdirs.user_cache_path("shoal") / "stores" / key / "bases")
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


def open_object_store(url: str) -> ObjectStore | None:
    """As ``open_store``, unless it is a local folder: then None, and nothing is made."""
    filesystem, root = _filesystem(url)
    return None if _is_local(filesystem) else ObjectStore(filesystem, root)


class LocalStore:
    """A store in a folder."""

    def __init__(self, folder: Path) -> None:
        self._records = folder / "records"
        self._packs = folder / "packs"
        self._temporary = folder / "temporary"
        self.packs = Packs(self._pack_names, self._read_pack)
        with _translated(str(folder)):
            self._records.mkdir(parents=True, exist_ok=True)
            self._packs.mkdir(exist_ok=True)
            self._temporary.mkdir(exist_ok=True)
            _sync_folder(folder)
            self._remove_leftovers()
            self.packs.refresh()  # here, and not in the first request that needs one

    def put(self, digest: str, data: bytes) -> None:
        """See ``Store``. A damaged record is replaced."""
        encoded = stored.encode(digest, data)
        path = self._path(digest)
        with _translated(str(path)):
            if self._is_packed(digest):
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            if not self._is_intact(path, digest):
                self._write(path, (encoded,))
            # Also when the record was there: whoever wrote it may not have come this far.
            for folder in (path.parent, path.parent.parent, self._records):
                _sync_folder(folder)

    def put_many(self, records: Sequence[tuple[str, bytes]]) -> str:
        """See ``Store``."""
        path = self._packs / pack_name(records)
        with _translated(str(path)):
            self._write(path, pack_chunks(records))
            _sync_folder(self._packs)
        self.packs.forget(path.name)
        return path.name

    def get(self, digest: str) -> bytes:
        """See ``Store``."""
        return self._get(digest, stored.decode)

    def get_stored(self, digest: str) -> bytes:
        """See ``Store``."""
        return self._get(digest, stored.verified)

    def _get(self, digest: str, form: stored.Form) -> bytes:
        path = self._path(digest)
        with _translated(str(path)):
            try:
                return form(digest, path.read_bytes(), str(path))
            except FileNotFoundError:
                return read_packed(self.packs, digest, str(path), form)

    def exists(self, digest: str) -> bool:
        """See ``Store``."""
        path = self._path(digest)
        with _translated(str(path)):
            return path.is_file() or self.packs.holds(digest)

    def delete(self, digest: str) -> None:
        """See ``Store``."""
        path = self._path(digest)
        with _translated(str(path)):
            path.unlink(missing_ok=True)
            if path.parent.is_dir():
                _sync_folder(path.parent)

    def records(self) -> Iterator[tuple[str, float]]:
        """See ``Store``."""
        with _translated(str(self._records)):
            for folder in self._records.glob("??/??"):
                for entry in os.scandir(folder):
                    if stored.is_digest(entry.name):
                        with contextlib.suppress(FileNotFoundError):
                            yield entry.name, entry.stat().st_mtime

    def retire_record(self, digest: str, before: float) -> bool:
        """See ``Store``."""
        return self._retire(self._path(digest), before)

    def pack_time(self, name: str) -> float:
        """See ``Store``."""
        return (self._packs / name).stat().st_mtime

    def retire_pack(self, name: str, before: float) -> bool:
        """See ``Store``."""
        self.packs.forget(name)
        return self._retire(self._packs / name, before)

    def leftovers(self, before: float) -> list[Path]:
        """See ``Store``."""
        with _translated(str(self._temporary)):
            return list(files_before(self._temporary.iterdir(), before))

    def _retire(self, path: Path, before: float) -> bool:
        """Delete ``path`` unless it is newer.

        Moved aside first: who puts the same bytes meanwhile either touched the file before, which
        shows in its time, or does not find it and writes it again.
        """
        with _translated(str(path)):
            aside = self._temporary / f"retired.{uuid.uuid4().hex}"
            try:
                if os.stat(path).st_mtime >= before:
                    return False
                os.replace(path, aside)
                if os.stat(aside).st_mtime >= before:
                    os.replace(aside, path)
                    return False
            except FileNotFoundError:
                return False  # another doctor was here, or took what is aside for a leftover
            _sync_folder(path.parent)
            aside.unlink(missing_ok=True)
            return True

    def _path(self, digest: str) -> Path:
        # Two levels of 256 folders: 15 files in each for a million records.
        return self._records.joinpath(*stored.key(digest))

    def _pack_names(self) -> list[str]:
        with _translated(str(self._packs)):
            return [name for name in os.listdir(self._packs) if name.endswith(SUFFIX)]

    def _read_pack(self, name: str, start: int, end: int | None) -> bytes:
        with (self._packs / name).open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            start = max(size + start, 0) if start < 0 else start
            end = size if end is None else min(end, size)
            return os.pread(file.fileno(), max(end - start, 0), start)

    def _is_packed(self, digest: str) -> bool:
        """Whether a pack has an intact copy and no file stands before it; it counts as new."""
        if self._path(digest).exists():
            return False
        for name, payload in self.packs.payloads(digest):
            with contextlib.suppress(RecordDamaged, FileNotFoundError):
                stored.decode(digest, payload, name)
                os.utime(self._packs / name)
                return True
        return False

    def _is_intact(self, path: Path, digest: str) -> bool:
        try:
            stored.decode(digest, path.read_bytes(), str(path))
            os.utime(path)
        except (FileNotFoundError, RecordDamaged):
            return False
        return True

    def _write(self, path: Path, chunks: Iterable[bytes]) -> None:
        """Write ``path`` in one step: a reader sees all of it or nothing, whatever stops us."""
        handle, name = tempfile.mkstemp(dir=self._temporary, prefix=path.name[:16] + ".")
        try:
            with os.fdopen(handle, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise

    def _remove_leftovers(self) -> None:
        for path in self.leftovers(time.time() - _LEFTOVER_AGE_S):
            # Another process cleans too; and on a read-only disk they do no harm.
            with contextlib.suppress(OSError):
                log.info("removing an unfinished record path=%s", path)
                path.unlink()


def files_before(paths: Iterable[Path], before: float) -> Iterator[Path]:
    """Those last written before ``before`` (unix time); what vanishes meanwhile is left out."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < before:
                yield path


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        filesystem, root = fsspec.core.url_to_fs(url, **url_options(url))
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
