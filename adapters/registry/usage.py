"""When adapters were last used: coarse, and never in a request's way.

A request only adds to a dictionary. A thread writes that down once a minute; what it cannot write
is lost, and so is the last minute when the process is killed.
"""

import logging
import threading
import time
from collections.abc import Callable
from itertools import islice

from sqlalchemy import bindparam, or_, update

from shoal.adapters.registry.database import Database
from shoal.adapters.registry.errors import RegistryUnavailable
from shoal.adapters.registry.tables import ADAPTERS

# An adapter's time is written at most this often, by all processes together.
INTERVAL_S = 60.0
# Adapters noted between two writes; further ones go unnoticed.
NOTED_MAX = 100_000
# Rows of one transaction: about 10 ms in which no upload can commit on SQLite.
_BATCH = 500

log = logging.getLogger(__name__)

_MARK = (
    update(ADAPTERS)
    .where(
        ADAPTERS.c.owner == bindparam("whose"),
        ADAPTERS.c.name == bindparam("what"),
        ADAPTERS.c.deleted_at.is_(None),
        or_(ADAPTERS.c.used.is_(None), ADAPTERS.c.used <= bindparam("seen") - INTERVAL_S),
    )
    .values(used=bindparam("seen"))
)


class UseRecorder:
    """Writes ``adapters.used``; thread-safe.

    Args:
        database: not closed by this.
        interval_s: between writes.
        clock: unix time in seconds.
    """

    def __init__(
        self,
        database: Database,
        *,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._interval_s = interval_s
        self._clock = clock
        self._lock = threading.Lock()
        self._noted: dict[tuple[str, str], float] = {}
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    def note(self, owner: str, name: str) -> None:
        """The adapter was used now. Never fails, and never waits for the database."""
        with self._lock:
            if len(self._noted) < NOTED_MAX or (owner, name) in self._noted:
                self._noted[owner, name] = self._clock()
            # Only now: a process that forks before its first request takes no thread along.
            if self._thread is None and not self._closing.is_set():
                self._thread = threading.Thread(
                    target=self._write_for_ever, name="adapter-use", daemon=True
                )
                self._thread.start()

    def flush(self) -> None:
        """Write what was noted. A database that does not answer is logged, not raised."""
        with self._lock:
            noted, self._noted = self._noted, {}
        # In one order everywhere, so that two processes do not lock each other out.
        rows = ({"whose": o, "what": n, "seen": t} for (o, n), t in sorted(noted.items()))
        try:
            while batch := list(islice(rows, _BATCH)):
                self._database.transact(lambda connection: connection.execute(_MARK, batch))
        except RegistryUnavailable as error:
            log.warning("use times of adapters not written: %s", error)

    def close(self) -> None:
        """Write what was noted and stop the thread."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        self.flush()

    def _write_for_ever(self) -> None:
        while not self._closing.wait(self._interval_s):
            self.flush()
