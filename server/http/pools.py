"""A few threads for blocking calls, shared by owners who take turns.

In the order in which they come, one owner's thousand calls would be before everybody else's next.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread

T = TypeVar("T")


class Pool:
    """At most ``threads`` calls at a time; for one event loop.

    When a thread falls free, it is the turn of the owner that has waited longest since its last.
    """

    def __init__(self, threads: int) -> None:
        self._limiter = anyio.CapacityLimiter(threads)
        self._free = threads
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    async def run(self, call: Callable[[], T], *, owner: str) -> T:
        """What ``call`` returns or raises; it runs to its end even if this is cancelled."""
        await self._turn(owner)
        # A task of its own: anyio keeps its own cancellation from a thread's caller, and not that
        # of a task, after which the thread would go on and its place be given away.
        work = asyncio.create_task(self._work(call))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            with anyio.CancelScope(shield=True):
                await asyncio.wait([work])
            if not work.cancelled():
                work.exception()  # nobody is there to be told
            raise

    async def _work(self, call: Callable[[], T]) -> T:
        try:
            return await anyio.to_thread.run_sync(call, limiter=self._limiter)
        finally:
            self._give_on()

    async def _turn(self, owner: str) -> None:
        if self._free:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._leave(owner, turn)
            else:  # it came at the same moment
                self._give_on()
            raise

    def _give_on(self) -> None:
        while self._waiting:
            owner, turns = self._waiting.popitem(last=False)
            turn = turns.popleft()
            if turns:
                self._waiting[owner] = turns  # behind all others
            if not turn.cancelled():
                turn.set_result(None)
                return
        self._free += 1

    def _leave(self, owner: str, turn: "asyncio.Future[None]") -> None:
        turns = self._waiting.get(owner)
        if turns is None or turn not in turns:
            return  # passed over since it was cancelled
        turns.remove(turn)
        if not turns:
            del self._waiting[owner]
