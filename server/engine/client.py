"""The engine as asyncio sees it: one async iterator for each request.

Owns the way of events from the engine's thread to the event loop: one thread-safe call a step,
whatever the number of tokens. Knows neither text nor HTTP.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable

from shoal.server.engine.loop import Deliver, EngineLoop
from shoal.server.engine.request import FinishReason, Request, TokenEvent
from shoal.server.engine.stats import EngineStats

log = logging.getLogger(__name__)

# Told of a request's events, on the event loop; must not block.
Sink = Callable[[TokenEvent], None]


class EngineClient:
    """Wraps the ``EngineLoop`` that ``make_loop(deliver)`` returns.

    ``EngineClient(functools.partial(EngineLoop, scheduler, runner))``. Everything but ``stats``
    and ``alive`` is called on the event loop that ran ``start``.
    """

    def __init__(self, make_loop: Callable[[Deliver], EngineLoop]) -> None:
        self._engine = make_loop(self._deliver)
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._sinks: dict[str, Sink] = {}

    @property
    def alive(self) -> bool:
        """Whether the engine's thread serves requests."""
        return self._engine.alive

    async def start(self) -> None:
        """Start the engine; its events go to the running event loop."""
        self._event_loop = asyncio.get_running_loop()
        self._engine.start()

    def follow(self, request: Request, sink: Sink) -> Callable[[], None]:
        """Submit a request, whose events ``sink`` is told of as steps produce them.

        Returns:
            What ends that: aborts the request within a step, unless it has ended. To be called
            once it has, too; ``sink`` is told nothing afterwards.

        Raises:
            Overloaded, Draining: not accepted.
        """
        assert self._event_loop is asyncio.get_running_loop(), "start() ran on another event loop"
        assert request.id not in self._sinks, f"request id {request.id} is in use"
        self._sinks[request.id] = sink
        try:
            self._engine.submit(request)
        except BaseException:
            del self._sinks[request.id]
            raise

        def leave() -> None:
            if self._sinks.pop(request.id, None) is not None:
                self._engine.abort(request.id)  # does nothing to a request that has ended

        return leave

    async def generate(
        self, request: Request, *, merge: bool = False
    ) -> AsyncGenerator[TokenEvent, None]:
        """Submit at the first iteration, yield events as steps produce them, end after the last.

        Args:
            merge: what has come since the consumer asked last is one event, so that a busy event
                loop falls behind by a few steps and no further.

        Closing the iterator, cancelling its consumer or dropping it aborts the request within a
        step. A caller that may stop early should close it (``contextlib.aclosing``).

        Raises:
            Overloaded, Draining: not accepted.
            ShoalError: the request failed, as its last event says.
        """
        # Bounded by the engine's limits: accepted requests, and each one's max_tokens events.
        queue: asyncio.Queue[TokenEvent] = asyncio.Queue()
        leave = self.follow(request, queue.put_nowait)
        try:
            held: TokenEvent | None = None
            while True:
                event, held = held or await queue.get(), None
                if merge and not queue.empty():
                    later: list[TokenEvent] = []
                    while held is None and not queue.empty():
                        after = queue.get_nowait()
                        # What went wrong is no reason to keep back what went well.
                        if after.error is None and after.finish_reason is not FinishReason.ABORT:
                            later.append(after)
                        else:
                            held = after
                    event = event.then(later)
                if event.error is not None:
                    raise event.error
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            leave()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the others; see ``EngineLoop.drain``."""
        return await asyncio.to_thread(self._engine.drain, timeout_s)

    async def stop(self) -> None:
        """End the engine's thread; what is left is aborted."""
        await asyncio.to_thread(self._engine.stop)

    def stats(self) -> EngineStats:
        """See ``EngineLoop.stats``."""
        return self._engine.stats()

    def _deliver(self, events: list[TokenEvent]) -> None:
        """On the engine's thread."""
        assert self._event_loop is not None
        self._event_loop.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: list[TokenEvent]) -> None:
        for event in events:
            sink = self._sinks.get(event.request_id)
            if sink is None:
                continue  # its consumer has left
            try:
                sink(event)
            except Exception:  # the consumer's bug; other requests' events must go on
                log.exception("a consumer of events failed request=%s", event.request_id)
