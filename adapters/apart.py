"""Uploads read, packed and published by processes beside the server's.

Checking one small adapter is tens of milliseconds of thousands of short calls, and publishing it a
dozen database statements, each of which holds the interpreter's lock: in the server's own process
the engine would wait for them between its launches. So a helper process, of the lowest priority,
does it, and what comes back is the packed bytes and the catalog's entry.

A helper has neither the base's weights nor the shared bases, only what identifies them. What needs
more (a file that brings its own factors, say) it leaves to the server, as does a helper that has
not started yet or has died. So nothing depends on there being one.

What is said between them, for one upload::

    server                             helper
    Asked                         ->   claim the name, read, check, pack, claim again
                                  <-   Made, a refusal, or None: the server must do it
    keep it in the host tier
    GO, or STOP                   ->   store the record
                                  <-   None, or a failure
    (no other writers meanwhile)
    GO                            ->   publish, unless the server is gone
                                  <-   AdapterInfo, or a failure

A helper that dies on the way leaves at most a record that no name refers to, or the upload as it
was asked for: the server does it again, which changes nothing then.
"""

import contextlib
import logging
import os
import pickle
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch

from shoal.adapters.basis import Basis, sketch
from shoal.adapters.errors import AdapterError
from shoal.adapters.packing import PackedAdapter
from shoal.adapters.preparing import Packing
from shoal.adapters.registry.catalog import AdapterInfo
from shoal.adapters.registry.errors import RegistryError
from shoal.adapters.registry.keys import Limits
from shoal.adapters.registry.registry import Address
from shoal.adapters.spec import AdapterSpec

log = logging.getLogger(__name__)

# Larger ones are left to the server: their work is in long calls, which release the lock.
BYTES_MAX = 32 << 20
# Helpers that died in a row before anything was answered: then there will be no others.
DEATHS_MAX = 3
# For a helper to publish: meanwhile nobody else here writes. More than it waits for the database.
PUBLISHED_S = 60.0


# What a helper is told when it waits.
GO, STOP = True, False


@dataclass(frozen=True, slots=True)
class Setup:
    """What a helper is told at its start.

    Attributes:
        canonical: a ``sketch`` of the base's own basis.
        spectral: whether the server serves what needs singular vectors.
    """

    registry: Address
    packing: Packing
    canonical: Basis
    max_bytes: int
    max_bases: int
    spectral: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One upload.

    Attributes:
        limits: of what the owner may have.
        bases: sketches of the known uploaded bases, when they are not those of the last request.
    """

    name: str
    owner: str
    limits: Limits | None
    files: Mapping[str, Path]
    bases: tuple[Basis, ...] | None = None


@dataclass(frozen=True, slots=True)
class Made:
    """An adapter, packed; its data as bytes."""

    spec: AdapterSpec
    data: bytearray

    def packed(self, dtype: torch.dtype) -> PackedAdapter:
        """As the server uses it, over the same memory."""
        return PackedAdapter(self.spec, torch.frombuffer(self.data, dtype=dtype))


class Died(Exception):
    """A helper is there no more, or makes no sense."""


class Helpers:
    """Processes that do uploads. Thread-safe; ``close`` ends them.

    Uploads that come before the first is ready are left to the server.
    """

    def __init__(self, setup: Callable[[], Setup], most: int, *, ahead: bool = False) -> None:
        """Args:
        setup: called once, by another thread, and maybe at once; may take its time.
        most: processes. Each has torch and the registry in memory, some hundred MB.
        ahead: start them now, one after the other, and not with the first uploads, which then
            find one or two.
        """
        self._setup = _once(setup)
        self._most = most
        self._changed = threading.Condition()
        # All guarded by it.
        self._idle: list[_Helper] = []
        self._helpers: set[_Helper] = set()
        self._starting = False
        self._deaths = 0
        self._closed = False
        # Seconds where the libraries it needs are not in memory yet.
        first = self._bring_up_all if ahead else self._set_up
        threading.Thread(target=first, name="shoal-upload-setup", daemon=True).start()

    def upload(
        self,
        asked: Asked,
        bases: Sequence[Basis],
        *,
        place: Callable[[PackedAdapter], None],
        published: AbstractContextManager[None],
    ) -> AdapterInfo | None:
        """Have an adapter uploaded; None when the caller must do that itself.

        Args:
            bases: all uploaded bases that are known.
            place: puts it where requests find it; what it raises is passed on, and then nothing
                is published.
            published: entered while it is being published.

        Raises:
            AdapterError, RegistryError: it is refused, or fails, as the caller's own would.
            OSError: its files cannot be read.
        """
        if sum(path.stat().st_size for path in asked.files.values()) > BYTES_MAX:
            return None
        helper = self._take()
        if helper is None:
            return None
        try:
            info = helper.upload(
                asked,
                bases,
                place=place,
                published=published,
            )
        except Died as problem:
            log.warning("an upload helper died pid=%d: %s", helper.pid, problem)
            self._bury(helper)
            return None
        except BaseException:
            if helper.at_rest:
                self._give(helper)
            else:
                self._bury(helper)
            raise
        self._give(helper)
        return info

    def close(self) -> None:
        """End the helpers; what they work on is left to the server."""
        with self._changed:
            self._closed = True
            helpers, self._helpers = self._helpers, set()
            self._idle = []
            self._changed.notify_all()
        for helper in helpers:
            helper.close()

    def _take(self) -> "_Helper | None":
        with self._changed:
            if not self._idle and self._begin_start():
                threading.Thread(
                    target=self._bring_up, name="shoal-upload-helper", daemon=True
                ).start()
            # Who waits is at most the server's upload threads.
            self._changed.wait_for(lambda: self._idle or not self._helpers)
            return self._idle.pop() if self._idle else None

    def _give(self, helper: "_Helper") -> None:
        with self._changed:
            self._deaths = 0
            if not self._closed:
                self._idle.append(helper)
            self._changed.notify()  # one who waits, since it is one helper

    def _bury(self, helper: "_Helper") -> None:
        helper.close()
        with self._changed:
            self._helpers.discard(helper)
            self._deaths += 1
            self._changed.notify_all()

    def _begin_start(self) -> bool:
        """With the lock held: whether to start one more now, which is then under way."""
        if self._starting or self._closed or self._deaths >= DEATHS_MAX:
            return False  # they only die, or soon one is there
        self._starting = len(self._helpers) < self._most
        return self._starting

    def _set_up(self) -> None:
        with contextlib.suppress(Exception):  # who needs it tries again, and says what is wrong
            self._setup()

    def _bring_up_all(self) -> None:
        while True:
            with self._changed:
                if not self._begin_start():
                    return
            if not self._bring_up():
                return  # tried again with the first upload

    def _bring_up(self) -> bool:
        """Returns whether there is one more."""
        helper, made = None, False
        try:
            helper = _Helper(self._setup())
        except Exception as problem:  # of the process, or of what it is told
            log.warning("an upload helper did not start: %s", problem)
        with self._changed:
            self._starting = False
            if helper is None:
                self._deaths += 1
            elif not self._closed:
                self._helpers.add(helper)
                self._idle.append(helper)
                made = True
            self._changed.notify_all()
        if helper is not None and not made:  # closed meanwhile
            helper.close()
        return made


def _once(make: Callable[[], Setup]) -> Callable[[], Setup]:
    """``make``, called the first time; whoever asks meanwhile waits."""
    lock = threading.Lock()
    made: list[Setup] = []

    def get() -> Setup:
        with lock:
            if not made:
                made.append(make())
            return made[0]

    return get


class _Helper:
    """One process; used by one thread at a time."""

    def __init__(self, setup: Setup) -> None:
        """Start it and wait until it is ready.

        Raises:
            OSError, EOFError, UnpicklingError: it did not start.
        """
        # -P: a folder that happens to be the current one is no place for modules. What is on this
        # process's path beyond the environment's (a test's, say) comes first in the helper's.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "shoal.adapters.apart_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            # The terminal's Ctrl-C is for the server, which ends its helpers.
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to: IO[bytes] = self._process.stdin
        self._from: IO[bytes] = self._process.stdout
        self.pid = self._process.pid
        self._dtype = setup.packing.dtype
        self._told: tuple[str, ...] = ()
        # Whether it waits for the next upload.
        self.at_rest = True
        try:
            send(self._to, setup)
            pickle.load(self._from)
        except BaseException:
            self.close()
            raise

    def upload(
        self,
        asked: Asked,
        bases: Sequence[Basis],
        *,
        place: Callable[[PackedAdapter], None],
        published: AbstractContextManager[None],
    ) -> AdapterInfo | None:
        """As ``Helpers.upload``. Raises Died, too."""
        ids = tuple(basis.id for basis in bases)
        told = None if ids == self._told else tuple(map(sketch, bases))
        self._told = ids
        made: Made | None = self._ask(replace(asked, bases=told))
        if made is None:
            return None
        self.at_rest = False
        try:
            place(made.packed(self._dtype))
        except BaseException:
            self._send(STOP)
            self.at_rest = True
            raise
        self._ask(GO)
        self.at_rest = False
        with published:
            info: AdapterInfo = self._ask(GO, within_s=PUBLISHED_S)
        return info

    def _send(self, message: object) -> None:
        try:
            send(self._to, message)
        except OSError as problem:
            raise Died(problem) from problem

    def _ask(self, message: object, *, within_s: float | None = None) -> Any:
        """The answer; raises it if it is a refusal or a failure, which end the upload."""
        self.at_rest = False
        self._send(message)
        if within_s is not None:
            answered = select.poll()
            answered.register(self._from, select.POLLIN)
            if not answered.poll(within_s * 1000):
                raise Died(f"it has not answered in {within_s:.0f} s")
        try:
            answer = pickle.load(self._from)
        except (OSError, EOFError, pickle.UnpicklingError) as problem:
            raise Died(problem) from problem
        self.at_rest = True
        if isinstance(answer, AdapterError | RegistryError):
            raise answer
        return answer

    def close(self) -> None:
        """End it: it ends by itself when its input does, and so also when the server is killed."""
        with contextlib.suppress(OSError):
            self._to.close()
        self._process.kill()
        self._process.wait()
        self._from.close()


def send(to: IO[bytes], message: Any) -> None:
    """Write one message."""
    pickle.dump(message, to, protocol=pickle.HIGHEST_PROTOCOL)
    to.flush()


def make_setup(
    registry: Address,
    packing: Packing,
    canonical: Basis,
    *,
    max_bytes: int,
    max_bases: int,
    spectral: bool,
) -> Setup:
    """What a helper needs to know; see ``Setup``."""
    return Setup(registry, packing, sketch(canonical), max_bytes, max_bases, spectral)
