"""Removes the bytes of deleted adapters, once an hour or so, in a thread of its own.

Any number of processes may do so on one registry: see ``garbage.py``.
"""

import logging
import random
import threading
from collections.abc import Callable

from shoal.adapters.registry.errors import RegistryError

# Bytes wait for a day anyway before they may go.
INTERVAL_S = 3600.0

log = logging.getLogger(__name__)


class Collector:
    """Calls ``collect`` again and again until it is closed.

    Args:
        collect: removes what may go and returns how much that was; is given a function that says
            whether to stop half-way.
        interval_s: between two calls, on average: half of it at least, at most one and a half. The
            first comes after less than one, so that processes which start together drift apart.
        wait: waits for so many seconds; True when it was woken to stop.
    """

    def __init__(
        self,
        collect: Callable[[Callable[[], bool]], int],
        *,
        interval_s: float = INTERVAL_S,
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        self._collect = collect
        self._interval_s = interval_s
        self._closing = threading.Event()
        self._wait = wait or self._closing.wait
        self._thread = threading.Thread(target=self._run, name="adapter-garbage", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop, after the record that is just being removed."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        wait_s = self._interval_s * random.random()
        while not self._wait(wait_s) and not self._closing.is_set():
            try:
                removed = self._collect(self._closing.is_set)
            except RegistryError as error:
                log.warning("garbage of the registry not collected: %s", error)
            except Exception:  # a bug must not end collecting for good
                log.exception("garbage of the registry not collected")
            else:
                if removed:
                    log.info("removed the bytes of deleted adapters records=%d", removed)
            wait_s = self._interval_s * random.uniform(0.5, 1.5)
