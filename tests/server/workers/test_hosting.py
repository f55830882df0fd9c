"""The engine's process gives back what a worker asked for, whenever nobody waits for it."""

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from shoal.server.engine.request import TokenEvent
from shoal.server.http.jobs import Job
from shoal.server.http.services import Services
from shoal.server.workers import hosting
from shoal.server.workers.hosting import Host
from shoal.server.workers.messages import Cancel, Start

JOB = cast(Job, None)


class Endless:
    """A run that ends when it is closed."""

    def __init__(self) -> None:
        self.began = self.ended = 0

    async def run(self, tell: Callable[[int, TokenEvent], None]) -> None:
        self.began += 1
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self.ended += 1


@pytest.mark.parametrize("turns", [0, 1, 3])
@pytest.mark.parametrize("how", ["cancelled", "died"])
def test_a_run_that_nobody_waits_for_is_forgotten(
    how: str, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        run = Endless()
        monkeypatch.setattr(hosting, "LocalRun", lambda *_: run)
        host = Host(cast(Services, None))
        host.received(Start(1, JOB))
        for _ in range(turns):  # with none, both messages came in one frame
            await asyncio.sleep(0)
        if how == "cancelled":
            host.received(Cancel(1))
        else:
            host.lost()
        for _ in range(10):
            await asyncio.sleep(0)
        assert run.began == run.ended == bool(turns)
        assert not cast(Any, host)._runs

    asyncio.run(check())
