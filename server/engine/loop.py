"""The engine's thread: drain the inbox, plan, submit, wait, commit, deliver.

When the runner looks ahead, the next step is planned and submitted before the one under way is
waited for, so that the device never waits for the planning.

The thread owns the scheduler and the runner: nobody else may touch them once it has started. It
knows neither asyncio (``client.py`` does) nor tensors (the runner does), and it is the only part
of the engine that has a clock and a thread.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from shoal.server.engine.admission import Door, DoorLimits
from shoal.server.engine.plan import DeviceLost, Pending, Runner, StepPlan
from shoal.server.engine.request import FinishReason, Request, TokenEvent
from shoal.server.engine.scheduler import FLIGHTS_MAX, Scheduler
from shoal.server.engine.stats import EngineStats
from shoal.server.errors import Draining, EngineFailure

Deliver = Callable[[list[TokenEvent]], None]


class Staged(Protocol):
    """Where adapters wait in host memory; pinned ones stay. ``HostTier`` is one."""

    def pin(self, digest: str) -> bool:
        """Keep an adapter; False when it is not there."""
        ...

    def unpin(self, digest: str) -> None:
        """Undo one ``pin``."""
        ...


# How long ``drain`` waits, after its timeout, for the step under way to let aborts through.
ABORT_GRACE_S = 10.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Step:
    """A step under way, and when its planning began (seconds of the performance counter)."""

    plan: StepPlan
    pending: Pending
    began: float


class EngineLoop:
    """Runs a scheduler and a runner on one thread.

    ``deliver`` is called on that thread, once for each step that has events; it must not block.
    All methods may be called from any thread except the loop's own.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        deliver: Deliver,
        staged: Staged | None = None,
        clock: Callable[[], float] = time.monotonic,
        idle: Callable[[], bool] | None = None,
    ) -> None:
        """Args:
        clock: seconds, as in the requests' ``arrival_s`` and ``deadline_s``.
        staged: pinned for each request from ``submit`` to its last event, since a plan may ask
            for its adapter until then, even when whoever submitted it has long left.
        idle: called on the loop's thread while there is nothing else to do, until it returns False:
            does a piece, of a fraction of a second, of what makes later steps faster.
        """
        self._staged = staged
        self._idle = idle
        self._scheduler = scheduler
        self._runner = runner
        self._deliver = deliver
        self._clock = clock
        # Only the thread touches these: submitted steps, the oldest first; when the last landed.
        self._under_way: deque[_Step] = deque()
        self._steps_max = FLIGHTS_MAX if runner.lookahead else 1
        self._landed_at = self._last_step_s = 0.0
        self._thread = threading.Thread(target=self._run, name="shoal-engine", daemon=True)
        # Guards everything below; notified when the inbox fills and when a turn is over.
        self._changed = threading.Condition()
        self._new: deque[Request] = deque()
        self._aborts: dict[str, None] = {}
        self._live: dict[str, Request] = {}  # accepted, last event not on its way yet
        self._busy = False  # events or steps are on their way
        self._draining = self._stopping = self._dead = False
        limits = scheduler.limits
        self._door = Door(
            DoorLimits(
                max_waiting=limits.max_waiting,
                max_waiting_per_tenant=limits.max_waiting_per_tenant or limits.max_waiting,
                max_wait_s=limits.max_wait_s,
            )
        )
        self._stats = scheduler.stats()

    @property
    def alive(self) -> bool:
        """Whether the thread runs; false before ``start``, after ``stop``, and once the device is
        lost or a bug of ours has ended it."""
        return self._thread.is_alive() and not self._dead

    def start(self) -> None:
        """Start the thread; once."""
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Accept a request: from now on it ends with exactly one final event.

        Raises:
            Draining: the engine takes no new requests.
            Overloaded: too many wait, or of its tenant, or it would wait too long; says when to
                come back (``admission.py``).
        """
        with self._changed:
            if self._draining or self._stopping or self._dead:
                raise Draining("the server is shutting down and takes no new requests")
            assert request.id not in self._live, f"request id {request.id} is in use"
            self._door.admit(request, self._clock())
            if self._staged is not None and request.adapter is not None:
                pinned = self._staged.pin(request.adapter.digest)
                assert pinned, "an adapter must be staged before its request is submitted"
            self._live[request.id] = request
            self._new.append(request)
            self._changed.notify_all()

    def abort(self, request_id: str) -> None:
        """End a request before the next step; nothing happens when it has ended already."""
        with self._changed:
            if request_id in self._live:
                self._aborts[request_id] = None
                self._changed.notify_all()

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests, wait for the accepted ones, abort those left after the timeout.

        Returns:
            True when every request ended by itself.
        """
        with self._changed:
            self._draining = True
            if self._changed.wait_for(self._is_empty, timeout_s):
                return True
            _log.warning("drain_timeout_s=%.1f aborted=%d", timeout_s, len(self._live))
            self._aborts.update(dict.fromkeys(self._live))
            self._changed.notify_all()
            self._changed.wait_for(self._is_empty, ABORT_GRACE_S)
            return False

    def stop(self) -> None:
        """End the thread once the steps under way have landed; what is left is aborted."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            started = self._thread.ident is not None
        if started:
            self._thread.join()
        else:
            self._end_all(_aborted)

    def stats(self) -> EngineStats:
        """Snapshot after the last step; requests in the inbox count as waiting."""
        with self._changed:
            return replace(self._stats, waiting=self._stats.waiting + len(self._new))

    # -- on the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._turn():
                pass
            events: list[TokenEvent] = []
            while self._under_way:
                self._land(events)
            self._hand_over(events)
            self._end_all(_aborted)
        except BaseException:
            # A bug of ours, a device that is gone, or an exit raised by the runner. The requests
            # must not hang on it, and ``alive`` must not say that others would be served.
            _log.critical("the engine thread failed; no further request is served", exc_info=True)
            self._end_all(_orphaned)

    def _turn(self) -> bool:
        """Land one step, or sleep until there is something to do; False when asked to stop."""
        while self._prepare():
            pass
        with self._changed:
            if not self._under_way:
                self._changed.wait_for(self._has_something_to_do)
            if self._stopping:
                return False
            new, aborts = list(self._new), list(self._aborts)
            self._new.clear()
            self._aborts.clear()
            self._door.take()
            # Counted as waiting until the scheduler's own numbers are published.
            self._stats = replace(self._stats, waiting=self._stats.waiting + len(new))
        events = [event for request in new if (event := self._scheduler.add(request))]
        # An abort may name a request that came with the same inbox, so these go second.
        events += [event for name in aborts if (event := self._scheduler.abort(name))]
        events += self._scheduler.tick(self._clock())
        while len(self._under_way) < self._steps_max and self._begin(events):
            pass
        if self._under_way:
            self._land(events)
        self._hand_over(events)
        return True

    def _prepare(self) -> bool:
        """Use an idle moment; False when there is none, or nothing to use it for."""
        if self._idle is None:
            return False
        with self._changed:
            if self._under_way or self._has_something_to_do():
                return False
        try:
            return self._idle()
        except DeviceLost:
            raise
        except Exception:  # whatever it was, steps go without it
            _log.exception("preparing_failed")
            self._idle = None
            return False

    def _has_something_to_do(self) -> bool:
        return bool(self._new or self._aborts or self._stopping or self._scheduler.has_work)

    def _is_empty(self) -> bool:
        return not self._live and not self._busy

    def _begin(self, events: list[TokenEvent]) -> bool:
        """Plan and submit one more step; False when there is none, or it failed at once."""
        began = time.perf_counter()
        plan = self._scheduler.plan()
        if plan is None:
            return False
        try:
            pending = self._runner.submit(plan)
        except DeviceLost:
            raise
        except Exception:  # as in ``_land``
            while self._under_way:  # plans are given back in their order
                self._land(events)
            events += self._failed(plan)
            return False
        self._under_way.append(_Step(plan, pending, began))
        return True

    def _land(self, events: list[TokenEvent]) -> None:
        """Wait for the oldest step and take its tokens in."""
        step = self._under_way.popleft()
        try:
            result = step.pending.wait()
        except DeviceLost:
            raise
        except Exception:  # whatever a device can throw; this boundary is where it becomes typed
            events += self._failed(step.plan)
        else:
            events += self._scheduler.commit(step.plan, result)
        now = time.perf_counter()
        # A step that was submitted early began to run when the one before it landed.
        self._last_step_s = now - max(step.began, self._landed_at)
        self._landed_at = now

    def _failed(self, plan: StepPlan) -> list[TokenEvent]:
        """Inside an ``except``: a step did not happen."""
        _log.exception("step_failed rows=%d tokens=%d", len(plan.rows), plan.num_tokens)
        error = EngineFailure("the step that carried this request failed")
        return self._scheduler.fail(plan, error)

    def _hand_over(self, events: list[TokenEvent], stats: EngineStats | None = None) -> None:
        """Publish the counters, then deliver.

        Who sees a last event sees the request's blocks freed, but for those that a step under
        way still uses.
        """
        look = None
        if stats is None:
            stats = replace(self._scheduler.stats(), last_step_s=self._last_step_s)
            look = (self._scheduler.backlog(), self._scheduler.service_total, self._clock())
        ended = {e.request_id for e in events if e.finish_reason is not None or e.error is not None}
        with self._changed:
            self._stats = stats
            if look is not None:
                self._door.look(*look)
            for request_id in ended:
                request = self._live.pop(request_id)
                if self._staged is not None and request.adapter is not None:
                    self._staged.unpin(request.adapter.digest)
            self._busy = bool(events or self._under_way)
            self._changed.notify_all()
        if not events:
            return
        try:
            self._deliver(events)
        except Exception:  # the consumer's bug; other requests' events must go on
            _log.exception("deliver_failed events=%d", len(events))
        with self._changed:
            self._busy = bool(self._under_way)
            self._changed.notify_all()

    def _end_all(self, last_event: Callable[[str], TokenEvent]) -> None:
        with self._changed:
            self._dead = True
            self._new.clear()
            self._aborts.clear()
            self._under_way.clear()  # nobody lands them any more
            left = sorted(self._live)
            stats = replace(self._stats, running=0, waiting=0, kv_blocks_used=0)
        self._hand_over([last_event(name) for name in left], stats)


def _aborted(request_id: str) -> TokenEvent:
    return TokenEvent(request_id=request_id, finish_reason=FinishReason.ABORT)


def _orphaned(request_id: str) -> TokenEvent:
    error = EngineFailure("the engine stopped working")
    return TokenEvent(request_id=request_id, error=error)
