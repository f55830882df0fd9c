"""Calls that a database does not answer: given up after a while, and not repeated by everybody.

A database that refuses, or whose host sends a reset, fails at once. One that is stopped, or behind
a network that drops packets, would keep every thread that asks it. ``Watchdog`` ends such a call
by shutting its socket down, which the driver sees as a lost connection. ``Door`` then lets one
caller in a while find out whether the database is back, and the others fail at once.
"""

import contextlib
import itertools
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator

from shoal.adapters.registry.errors import RegistryUnavailable

# How often the watchdog looks.
POLL_S = 0.25
# A failure that took less kept nobody waiting.
SLOW_S = 1.0
# How long one caller has to find out, before the next one may.
RETRY_S = 2.0

log = logging.getLogger(__name__)


class Watchdog:
    """Shuts down sockets on which a call takes too long; thread-safe.

    Args:
        poll_s: how much later than its limit a call may end.
    """

    def __init__(self, *, poll_s: float = POLL_S) -> None:
        self._poll_s = poll_s
        self._lock = threading.Lock()
        self._watched: dict[int, tuple[float, socket.socket]] = {}
        self._numbers = itertools.count()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def limited(self, connection: socket.socket, limit_s: float) -> Iterator[None]:
        """Shut ``connection`` down if the block is still running after ``limit_s``."""
        number = next(self._numbers)
        with self._lock:
            self._watched[number] = time.monotonic() + limit_s, connection
            # Only now: a process that forks before its first call takes no thread along.
            if self._thread is None and not self._closing.is_set():
                self._thread = threading.Thread(
                    target=self._watch, name="database-watchdog", daemon=True
                )
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._watched.pop(number, None)

    def close(self) -> None:
        """Stop watching."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._closing.wait(self._poll_s):
            now = time.monotonic()
            # Under the lock: whoever has left ``limited`` may close the socket.
            with self._lock:
                late = [number for number, (until, _) in self._watched.items() if until < now]
                for number in late:
                    _, connection = self._watched.pop(number)
                    log.warning("the database does not answer; giving its connection up")
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)


class Door:
    """Open until a call was failed by silence, and again once one succeeds; thread-safe.

    Args:
        clock: seconds, never backwards.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._next_try: float | None = None

    def enter(self) -> float:
        """Go in, or be told at once that it is of no use; returns the time.

        Raises:
            RegistryUnavailable: somebody else is finding out.
        """
        now = self._clock()
        if self._next_try is not None:
            with self._lock:
                if self._next_try is not None:
                    if now < self._next_try:
                        raise RegistryUnavailable("the database did not answer a moment ago")
                    self._next_try = now + RETRY_S
        return now

    def failed(self, entered: float) -> None:
        """A call got no answer; it had entered then."""
        now = self._clock()
        if now - entered >= SLOW_S:
            with self._lock:
                self._next_try = now + RETRY_S

    def answered(self) -> None:
        """A call was answered."""
        if self._next_try is not None:
            with self._lock:
                self._next_try = None
