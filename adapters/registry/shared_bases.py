"""The files of a registry's shared bases: a folder, and on an object store a copy for other hosts.

Adapters are written in these bases, so a basis must be where every host finds it before an adapter
that needs it has a name. A basis never changes; its id is the sha256 of its file.
"""

import contextlib
import hashlib
import logging
import os
import tempfile
from pathlib import Path

from shoal.adapters.registry.errors import RecordDamaged
from shoal.adapters.registry.object_store import ObjectStore
from shoal.adapters.registry.store import Places, open_object_store
from shoal.adapters.registry.stored import is_digest

_SUFFIX = ".safetensors"
_REMOTE = "bases"

log = logging.getLogger(__name__)


class SharedBases:
    """Files ``<id>.safetensors`` in a folder; thread-safe, and shared with other processes.

    All methods may raise RegistryUnavailable.

    Args:
        folder: may be missing. Where there is a ``store`` it is this host's copy.
        store: where other hosts look for them; None if they have the same folder, or there are
            none.
    """

    def __init__(self, folder: Path, store: ObjectStore | None = None) -> None:
        self.folder = folder
        self._store = store

    @classmethod
    def open(cls, where: Places) -> "SharedBases":
        """Those of a registry, complete in ``folder`` and in the store."""
        bases = cls(where.bases, open_object_store(where.store_url))
        bases.sync()
        return bases

    def sync(self) -> None:
        """Fetch what only the store has, and send what only the folder has."""
        if self._store is None:
            return
        there = {name.removesuffix(_SUFFIX) for name in self._store.files(_REMOTE)}
        here = {path.stem for path in self.folder.glob(f"*{_SUFFIX}")}
        for basis_id in sorted(filter(is_digest, there - here)):
            try:
                self.fetch(basis_id)
            except RecordDamaged as error:
                log.error("a shared basis is left out, and so are the adapters on it: %s", error)
        for basis_id in sorted(filter(is_digest, here - there)):
            self.send(basis_id)

    def fetch(self, basis_id: str) -> Path:
        """Where the file of a basis is, which need not exist. Fetched if only the store has it.

        Raises:
            RecordDamaged: the store has other bytes.
        """
        path = self.folder / f"{basis_id}{_SUFFIX}"
        if self._store is None or path.exists():
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=f".{path.name}.")
        os.close(handle)
        try:
            self._store.fetch_file(f"{_REMOTE}/{path.name}", Path(temporary))
            with open(temporary, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != basis_id:
                raise RecordDamaged(f"basis {basis_id} in the store has sha256 {digest}")
            os.replace(temporary, path)
        except FileNotFoundError:
            pass  # the caller sees that it is not there
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        return path

    def send(self, basis_id: str) -> None:
        """Make a basis of the folder durable where every host finds it."""
        if self._store is not None:
            name = f"{basis_id}{_SUFFIX}"
            self._store.send_file(f"{_REMOTE}/{name}", self.folder / name)
