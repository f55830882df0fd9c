"""Compile all kernels of a program at once, in threads, before its first launch.

Triton compiles a kernel when it is first launched, one after the other: the forty-odd seconds of a
server's first start. Almost all of that is outside the interpreter's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from shoal.kernels.launching import require_triton

Compile = Callable[[], object]
Finish = Callable[[object], None]


@contextmanager
def compiling_ahead(threads: int) -> Iterator[bool]:
    """Within it, kernels that are launched and not yet compiled are compiled, and not launched.

    When it ends all of them are compiled, and loaded on the current device. What such a launch
    would have written stays what it was: what is computed meanwhile must not be used, nor decide
    what is read or written.

    Only for launches of this thread. Threads compile at full speed beside each other.

    Yields:
        False with a Triton that cannot do so: there a launch compiles and launches as ever.

    Raises:
        What the compiler raises, at the end.
    """
    require_triton()
    import triton

    if not hasattr(triton, "AsyncCompileMode"):
        yield False
        return
    jobs: dict[str, tuple[Compile, list[Finish]]] = {}
    unlaunched = _Unlaunched()

    class Collecting(triton.AsyncCompileMode):  # type: ignore[misc]
        def submit(self, key: str, compile_fn: Compile, finalize_fn: Finish, *_: object) -> object:
            # More than one where launches that Triton tells apart need the same kernel.
            jobs.setdefault(key, (compile_fn, []))[1].append(finalize_fn)
            finalize_fn(unlaunched)  # or each launch would build and hash its source again
            return unlaunched

    try:
        with Collecting(None):
            yield True
        device = torch.cuda.current_device() if torch.cuda.is_available() else None

        def compiled_and_loaded(compile_fn: Compile) -> Any:
            if device is not None:
                torch.cuda.set_device(device)
            kernel: Any = compile_fn()
            kernel.run  # noqa: B018  # builds what launches it, with a C compiler, and loads both
            return kernel

        # Only now: beside so many threads this one would hardly get the lock to go on.
        with ThreadPoolExecutor(threads, "compile") as executor:
            compiled = executor.map(compiled_and_loaded, (job for job, _ in jobs.values()))
            for (_, finishes), kernel in zip(jobs.values(), compiled, strict=True):
                for finish in finishes:
                    finish(kernel)
    finally:
        unlaunched.ended = True


class _Unlaunched:
    """What Triton launches in place of a kernel that is being compiled."""

    function: object = None
    packed_metadata: object = None

    def __init__(self) -> None:
        self.ended = False

    def launch_metadata(self, *_: object) -> None:
        """As a compiled kernel's."""

    def run(self, *_: object) -> None:
        """Launch nothing.

        Raises:
            RuntimeError: it is still there since its kernel could not be compiled.
        """
        if self.ended:
            raise RuntimeError("this kernel could not be compiled")
