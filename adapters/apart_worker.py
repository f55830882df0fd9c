"""The helper process of ``apart.py``: does one upload after the other.

Its input and output are pickles, to and from the server that started it and nobody else. It ends
when its input does.
"""

import os
import pickle
import select
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NoReturn, cast

import torch

from shoal.adapters.apart import STOP, Asked, Made, Setup, send
from shoal.adapters.basis import Basis, BasisStore
from shoal.adapters.errors import AdapterError
from shoal.adapters.layouts import Layouts
from shoal.adapters.preparing import Prepared
from shoal.adapters.reading import read_adapter
from shoal.adapters.registry.errors import RegistryError
from shoal.adapters.registry.registry import Registry
from shoal.adapters.spectral_basis import SpectralBasis

# Below the engine, which takes all cores that it gets on a CPU: an upload can wait, streams cannot.
NICE = 10


class NotHere(Exception):
    """The adapter needs something that only the server has."""


class _Absent:
    """Stands for what is not here."""

    def __getattr__(self, name: str) -> NoReturn:
        raise NotHere(name)

    def __call__(self, *args: object) -> NoReturn:
        raise NotHere


class _Known:
    """The known bases, which can be compared with and not added to."""

    def __init__(self) -> None:
        self.bases: tuple[Basis, ...] = ()

    def all(self) -> tuple[Basis, ...]:
        return self.bases

    def __getattr__(self, name: str) -> NoReturn:
        raise NotHere(name)


def prepare(setup: Setup, files: Mapping[str, Path], known: _Known) -> Prepared | None:
    """Read, check and pack an adapter; None when it cannot be done here.

    Raises:
        AdapterError: it is refused.
    """
    absent = cast(Any, _Absent())
    try:
        weights = read_adapter(
            files,
            shape=setup.packing.shape,
            weight_of=absent,
            bases=cast(BasisStore, known),
            canonical=setup.canonical,
            max_bytes=setup.max_bytes,
            max_bases=setup.max_bases,
            spectral=cast(SpectralBasis, absent) if setup.spectral else None,
        )
        return setup.packing.prepare(weights)
    except AdapterError:
        raise
    except Exception:  # whatever it is, the server meets it too, and says so
        return None


class Gone(Exception):
    """The server that wanted it is."""


class Worker:
    """Does what one server asks.

    Args:
        source, sink: to and from the server.
    """

    def __init__(self, setup: Setup, source: IO[bytes], sink: IO[bytes]) -> None:
        layouts = Layouts(setup.packing.shape, setup.packing.dtype)
        self._setup = replace(setup, packing=replace(setup.packing, layouts=layouts))
        self._source = source
        self._sink = sink
        self._known = _Known()
        self._registry: Registry | None = None
        self._hangup = select.poll()
        self._hangup.register(source, select.POLLHUP)

    def serve(self) -> NoReturn:
        """Raises EOFError or OSError when the server is gone."""
        while True:
            asked: Asked = pickle.load(self._source)
            try:
                answer = self._upload(asked)
            except (AdapterError, RegistryError) as failure:
                answer = failure
            if answer is not STOP:
                send(self._sink, answer)

    def _upload(self, asked: Asked) -> object:
        """The last answer, after the others."""
        if asked.bases is not None:
            self._known.bases = asked.bases
        registry = self._opened()
        name, owner, limits = asked.name, asked.owner, asked.limits
        registry.claim(name, owner=owner, limits=limits)
        prepared = prepare(self._setup, asked.files, self._known)
        if prepared is None:
            return None
        content = prepared.content
        registry.claim(name, owner=owner, content=content, limits=limits)
        data = bytearray(prepared.packed.data.view(torch.uint8).numpy())
        if self._say(Made(prepared.packed.spec, data)) is STOP:
            return STOP
        registry.store(content.digest, prepared.record)
        self._say(None)
        return registry.publish_stored(
            name, content, owner=owner, limits=limits, before_commit=self._still_wanted
        )

    def _say(self, message: object) -> bool:
        """Whether to go on."""
        send(self._sink, message)
        return bool(pickle.load(self._source))

    def _opened(self) -> Registry:
        # Not at the start: a database that is away then is told of, like one that goes later.
        if self._registry is None:
            self._registry = self._setup.registry.open()
        return self._registry

    def _still_wanted(self) -> None:
        """What was never answered must not appear long after its server was killed."""
        if self._hangup.poll(0):
            raise Gone


def main() -> None:
    """Work until the input ends."""
    source: IO[bytes] = sys.stdin.buffer
    # Whatever else is printed must not get between the answers.
    sink = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    if hasattr(os, "nice"):
        os.nice(NICE)
    torch.set_num_threads(1)
    try:
        setup: Setup = pickle.load(source)
        worker = Worker(setup, source, sink)
        send(sink, True)
        worker.serve()
    # Half a message: the server ended while it said it.
    except (EOFError, pickle.UnpicklingError, BrokenPipeError, Gone, KeyboardInterrupt):
        os._exit(0)  # nothing to tidy, and nobody to tell


if __name__ == "__main__":
    main()
