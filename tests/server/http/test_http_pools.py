"""Threads that owners share: nobody waits behind all that another one asked for."""

import asyncio
import random
import threading
import time
from contextlib import suppress
from functools import partial

import anyio
import pytest

from shoal.server.http.pools import Pool

pytestmark = pytest.mark.anyio


async def test_owners_take_turns() -> None:
    pool = Pool(1)
    done: list[str] = []
    go_on = threading.Event()
    async with anyio.create_task_group() as group:

        async def run(owner: str) -> None:
            await pool.run(partial(go_on.wait, 10), owner=owner)
            done.append(owner)

        for owner in ["ann"] * 20 + ["bob"] * 2 + ["eve"]:
            group.start_soon(run, owner)
        while pool.num_waiting < 22:
            await anyio.sleep(0.001)
        go_on.set()
    assert done[:6] == ["ann", "ann", "bob", "eve", "ann", "bob"]
    assert done.count("ann") == 20


@pytest.mark.parametrize("seed", range(4))
async def test_no_thread_is_lost_or_shared_whoever_leaves(seed: int) -> None:
    rng = random.Random(seed)
    pool = Pool(3)
    guard, running, most = threading.Lock(), 0, 0

    def call(pause_s: float, fails: bool) -> None:
        nonlocal running, most
        with guard:
            running += 1
            most = max(most, running)
        time.sleep(pause_s)
        with guard:
            running -= 1
        if fails:
            raise KeyError

    scopes: list[anyio.CancelScope] = []

    async def run(scope: anyio.CancelScope, pause_s: float, fails: bool, owner: str) -> None:
        with scope, suppress(KeyError):
            await pool.run(partial(call, pause_s, fails), owner=owner)

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            for _ in range(200):
                scopes.append(anyio.CancelScope())
                pause_s, fails = rng.random() * 0.002, rng.random() < 0.2
                group.start_soon(run, scopes[-1], pause_s, fails, rng.choice("abc"))
                if rng.random() < 0.5:
                    rng.choice(scopes).cancel()
                if rng.random() < 0.3:
                    await anyio.sleep(rng.random() * 0.002)
    assert most == 3
    assert pool.num_waiting == 0
    assert pool._free == 3


async def test_a_cancelled_tasks_call_keeps_its_place_to_its_end() -> None:
    pool, may_go, began = Pool(1), threading.Event(), threading.Event()

    def slow() -> None:
        began.set()
        may_go.wait(30)

    first = asyncio.create_task(pool.run(slow, owner="a"))
    while not began.is_set():
        await asyncio.sleep(0.001)
    first.cancel()
    second = asyncio.create_task(pool.run(lambda: 2, owner="b"))
    await asyncio.sleep(0.02)
    assert not first.done(), "what the call uses may be the caller's"
    assert pool.num_waiting == 1
    may_go.set()
    assert await second == 2
    with pytest.raises(asyncio.CancelledError):
        await first
