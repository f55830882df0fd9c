"""Where a process keeps the bodies that it is receiving, and what killed processes left there.

A folder of its own in the system's temporary one, locked for as long as the process lives. Who
makes such a folder removes those that nobody holds: a process that was killed cannot, and its
bodies would fill the disk.
"""

import atexit
import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import threading
import time
from pathlib import Path

PREFIX = "shoal-uploads-"
LOCK = "lock"
# What its owner writes there once it holds it: unlocked before that, a folder is being made, unless
# it is older than this.
HELD = b"1"
MAKING_S = 60.0


class Spool:
    """Makes folders for bodies. Thread-safe.

    Args:
        parent: where it is.
    """

    def __init__(self, parent: Path) -> None:
        self._parent = parent
        self._guard = threading.Lock()
        self._folder: Path | None = None
        self._lock = -1

    def new_folder(self) -> Path:
        """An empty folder, to be removed by the caller.

        Raises:
            OSError: it cannot be made.
        """
        with self._guard:
            if self._folder is None or not self._folder.exists():  # also when somebody tidied up
                self._open()
            assert self._folder is not None
            return Path(tempfile.mkdtemp(dir=self._folder, prefix="upload-"))

    def close(self) -> None:
        """Remove everything; a new folder is made when one is asked for again."""
        with self._guard:
            self._release()

    def _open(self) -> None:
        self._release()
        remove_abandoned(self._parent)
        folder = Path(tempfile.mkdtemp(dir=self._parent, prefix=PREFIX))
        try:
            self._lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            os.write(self._lock, HELD)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._folder = folder

    def _release(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def remove_abandoned(parent: Path) -> int:
    """Remove the folders in ``parent`` whose processes are gone; returns how many.

    Only this user's, and no links. What cannot be removed is left.
    """
    removed = 0
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if _is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)
                removed += 1
    return removed


def _is_abandoned(folder: Path) -> bool:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        return False
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        # With something in it, it was locked once: somebody tidied up, and its owner may live.
        return time.time() - found.st_mtime > MAKING_S and not any(folder.iterdir())
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return os.fstat(lock).st_size > 0 or time.time() - found.st_mtime > MAKING_S
    finally:
        os.close(lock)


_spools: dict[tuple[int, str], Spool] = {}


def spool() -> Spool:
    """This process's own, removed when it ends in order."""
    key = os.getpid(), tempfile.gettempdir()
    made = _spools.get(key)
    if made is None:
        made = _spools.setdefault(key, Spool(Path(key[1])))
        atexit.register(_close, *key)
    return made


def _close(pid: int, parent: str) -> None:
    if pid == os.getpid():  # and not that of whom this process was forked from
        _spools[pid, parent].close()
