"""Drives one load from several processes.

One process of Python reads some 10,000 streamed tokens a second: a server that sends more would be
measured by its client.
"""

import asyncio
import multiprocessing
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

from shoal.loadtests.client import ClientOptions, connect, drive
from shoal.loadtests.stats import Sample
from shoal.loadtests.workload import PlannedRequest

# For the processes to start.
START_S = 120.0
# For a request to reach every process.
_LEAD_S = 0.5


def drive_apart(
    processes: int,
    options: ClientOptions,
    planned: Sequence[PlannedRequest],
    on_done: Callable[[int], None] = lambda count: None,
) -> list[Sample]:
    """As ``drive``, every n-th request from another process.

    Args:
        processes: from 1.
        options: without ``max_concurrency``, which would need them to agree.
        on_done: told of each process that has ended, and how many requests it sent.
    """
    if options.max_concurrency is not None:
        raise ValueError("a limit on requests in flight needs one client process")
    spawn = multiprocessing.get_context("spawn")
    parts = [planned[first::processes] for first in range(processes)]
    ready = spawn.Barrier(processes + 1)
    with ProcessPoolExecutor(
        processes, mp_context=spawn, initializer=_wait, initargs=(ready,)
    ) as pool:
        for _ in parts:
            pool.submit(_nothing)
        ready.wait(START_S)  # each has imported all it needs
        # The clock counts from the machine's start, not the process's.
        start = time.perf_counter() + _LEAD_S
        waiting = [pool.submit(_drive, options, part, start) for part in parts]
        samples: list[Sample] = []
        for future, part in zip(waiting, parts, strict=True):
            samples += future.result()
            on_done(len(part))
    return sorted(samples, key=lambda sample: sample.index)


def _wait(ready: threading.Barrier) -> None:
    ready.wait(START_S)


def _nothing() -> None:
    pass


def _drive(options: ClientOptions, part: Sequence[PlannedRequest], start: float) -> list[Sample]:
    async def go() -> list[Sample]:
        async with connect(options.base_url, options.api_key) as client:
            return await drive(client, options, part, start=start)

    return asyncio.run(go()) if part else []
