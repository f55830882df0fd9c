"""The helper process of ``apart.py``: reads, checks and packs one upload after the other.

Its input and output are pickles, to and from the server that started it and nobody else. It ends
when its input does.
"""

import os
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NoReturn, cast

import torch

from shoal.adapters.apart import Answer, Asked, Made, Setup, send
from shoal.adapters.basis import Basis, BasisStore
from shoal.adapters.errors import AdapterError
from shoal.adapters.reading import read_adapter
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


def answer(setup: Setup, files: Mapping[str, Path], known: _Known) -> Answer:
    """Prepare one upload; None when it cannot be done here."""
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
        prepared = setup.packing.prepare(weights)
    except AdapterError as refusal:
        return refusal
    except Exception:  # whatever it is, the server meets it too, and says so
        return None
    data = prepared.packed.data
    return Made(
        prepared.content,
        prepared.record,
        prepared.packed.spec,
        bytearray(data.view(torch.uint8).numpy()),
    )


def main() -> None:
    """Answer until the input ends."""
    source: IO[bytes] = sys.stdin.buffer
    # Whatever else is printed must not get between the answers.
    sink = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    if hasattr(os, "nice"):
        os.nice(NICE)
    torch.set_num_threads(1)
    try:
        setup: Setup = pickle.load(source)
        send(sink, True)
        known = _Known()
        while True:
            asked: Asked = pickle.load(source)
            if asked.bases is not None:
                known.bases = asked.bases
            send(sink, answer(setup, asked.files, known))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        os._exit(0)  # nothing to tidy, and nobody to tell


if __name__ == "__main__":
    main()
