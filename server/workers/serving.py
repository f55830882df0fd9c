"""Runs the engine here and HTTP in workers, with the same orderly end as ``http/serving.py``."""

import asyncio
import sys

from shoal.server.config import ServeConfig
from shoal.server.garbage import settled
from shoal.server.http.auth import is_open
from shoal.server.http.services import Services
from shoal.server.http.serving import (
    FLUSH_S,
    FORCED_FLUSH_S,
    SWITCH_S,
    Ending,
    announce,
    new_loop,
)
from shoal.server.workers.processes import Workers


def serve_apart(services: Services, config: ServeConfig, workers: Workers) -> int:
    """As ``http.serving.serve``. Must run in the main thread.

    Raises:
        OSError: a worker did not start.
    """
    sys.setswitchinterval(SWITCH_S)
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(_serve(services, config, workers))


async def _serve(services: Services, config: ServeConfig, workers: Workers) -> int:
    await services.engine.start()
    ended = asyncio.Event()
    flush_s = FLUSH_S

    async def drain(timeout_s: float) -> bool:
        services.draining = True
        workers.drain()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await workers.drained()
        except TimeoutError:
            await services.engine.drain(0.0)
            return False
        return await services.engine.drain(max(0.0, deadline - loop.time()))

    def forced() -> None:
        nonlocal flush_s
        flush_s = FORCED_FLUSH_S

    async def begin() -> None:
        await workers.serve(services)
        announce(workers.url, is_open=await is_open(services))

    ending = Ending(drain, ended.set, forced, config.shutdown_timeout)
    try:
        with settled(grows=True), ending.on_signals():
            beginning = asyncio.create_task(begin())
            waiting = asyncio.create_task(ended.wait())
            await asyncio.wait((beginning, waiting), return_when=asyncio.FIRST_COMPLETED)
            if not beginning.done():
                beginning.cancel()  # a signal came first
                await asyncio.wait((beginning,))
            else:
                beginning.result()
                await waiting
            await workers.exit(flush_s)
    finally:
        await services.engine.stop()
    return ending.exit_code
