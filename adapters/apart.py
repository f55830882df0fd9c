"""Uploads read and packed in processes beside the server's.

Checking one small adapter is tens of milliseconds of thousands of short calls, each of which holds
the interpreter's lock: in the server's own process the engine would wait for them between its
launches. So a helper process, of the lowest priority, does it, and what comes back is bytes.

A helper has neither the base's weights nor the shared bases, only what identifies them. What needs
more (a file that brings its own factors, say) it leaves to the server, as does a helper that has
not started yet or has died. So nothing depends on there being one.
"""

import contextlib
import logging
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from shoal.adapters.basis import Basis, sketch
from shoal.adapters.errors import AdapterError
from shoal.adapters.packing import PackedAdapter
from shoal.adapters.preparing import Packing, Prepared
from shoal.adapters.registry.catalog import Content
from shoal.adapters.spec import AdapterSpec

log = logging.getLogger(__name__)

# Larger ones are left to the server: their work is in long calls, which release the lock.
BYTES_MAX = 32 << 20
# Helpers that died in a row before anything was answered: then there will be no others.
DEATHS_MAX = 3


@dataclass(frozen=True, slots=True)
class Setup:
    """What a helper is told at its start.

    Attributes:
        canonical: a ``sketch`` of the base's own basis.
        spectral: whether the server serves what needs singular vectors.
    """

    packing: Packing
    canonical: Basis
    max_bytes: int
    max_bases: int
    spectral: bool


@dataclass(frozen=True, slots=True)
class Asked:
    """One upload.

    Attributes:
        bases: sketches of the known uploaded bases, when they are not those of the last request.
    """

    files: Mapping[str, Path]
    bases: tuple[Basis, ...] | None


@dataclass(frozen=True, slots=True)
class Made:
    """An adapter, prepared; its packed data as bytes."""

    content: Content
    record: bytes
    spec: AdapterSpec
    data: bytearray

    def prepared(self, dtype: torch.dtype) -> Prepared:
        """As the server uses it, over the same memory."""
        data = torch.frombuffer(self.data, dtype=dtype)
        return Prepared(self.content, self.record, PackedAdapter(self.spec, data))


Answer = Made | AdapterError | None  # None: the server must do it


class Helpers:
    """Processes that prepare uploads. Thread-safe; ``close`` ends them.

    None is started before the first upload, which, as those that come until the first is ready, is
    left to the server.
    """

    def __init__(self, setup: Setup, most: int) -> None:
        """Args:
        most: processes. Each takes 260 MB and checks some 30 small adapters a second.
        """
        self._setup = setup
        self._most = most
        self._changed = threading.Condition()
        # All guarded by it.
        self._idle: list[_Helper] = []
        self._helpers: set[_Helper] = set()
        self._starting = False
        self._deaths = 0
        self._closed = False

    def prepare(self, files: Mapping[str, Path], bases: Sequence[Basis]) -> Prepared | None:
        """Read, check and pack an adapter; None when the caller must do that itself.

        Args:
            bases: all uploaded bases that are known.

        Raises:
            AdapterError: it is refused, as the caller would refuse it.
            OSError: its files cannot be read.
        """
        if sum(path.stat().st_size for path in files.values()) > BYTES_MAX:
            return None
        helper = self._take()
        if helper is None:
            return None
        try:
            answer = helper.ask(files, bases)
        except (OSError, EOFError, pickle.UnpicklingError) as problem:
            log.warning("an upload helper died pid=%d: %s", helper.pid, problem)
            self._bury(helper)
            return None
        self._give(helper)
        if isinstance(answer, AdapterError):
            raise answer
        return None if answer is None else answer.prepared(self._setup.packing.dtype)

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
            if not self._idle and len(self._helpers) < self._most and not self._starting:
                self._start()
            # Who waits is at most the server's upload threads.
            self._changed.wait_for(lambda: self._idle or not self._helpers)
            return self._idle.pop() if self._idle else None

    def _give(self, helper: "_Helper") -> None:
        with self._changed:
            self._deaths = 0
            if not self._closed:
                self._idle.append(helper)
            self._changed.notify_all()

    def _bury(self, helper: "_Helper") -> None:
        helper.close()
        with self._changed:
            self._helpers.discard(helper)
            self._deaths += 1
            self._changed.notify_all()

    def _start(self) -> None:
        """With the lock held: begin to start one more, unless they only die."""
        if self._closed or self._deaths >= DEATHS_MAX:
            return
        self._starting = True
        threading.Thread(target=self._bring_up, name="shoal-upload-helper", daemon=True).start()

    def _bring_up(self) -> None:
        helper = None
        try:
            helper = _Helper(self._setup)
        except (OSError, EOFError, pickle.UnpicklingError) as problem:
            log.warning("an upload helper did not start: %s", problem)
        with self._changed:
            self._starting = False
            if helper is None:
                self._deaths += 1
            elif not self._closed:
                self._helpers.add(helper)
                self._idle.append(helper)
                helper = None
            self._changed.notify_all()
        if helper is not None:  # closed meanwhile
            helper.close()


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
        self._told: tuple[str, ...] = ()
        try:
            send(self._to, setup)
            pickle.load(self._from)
        except BaseException:
            self.close()
            raise

    def ask(self, files: Mapping[str, Path], bases: Sequence[Basis]) -> Answer:
        """Have an upload prepared. Raises OSError, EOFError, UnpicklingError when it has died."""
        ids = tuple(basis.id for basis in bases)
        told = None if ids == self._told else tuple(map(sketch, bases))
        send(self._to, Asked(dict(files), told))
        self._told = ids
        answer: Answer = pickle.load(self._from)
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
    packing: Packing, canonical: Basis, *, max_bytes: int, max_bases: int, spectral: bool
) -> Setup:
    """What a helper needs to know; see ``Setup``."""
    return Setup(packing, sketch(canonical), max_bytes, max_bases, spectral)
