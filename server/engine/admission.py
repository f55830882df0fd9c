"""Whether a request may wait, and if not, when it should come back.

Pure; ``EngineLoop`` guards it with its lock, asks it about each request and tells it after each
step what changed in the queue. A request is refused when too many wait, or too many of its tenant,
or when it would start later than a limit.

*When to come back.* The engine serves so much a second (measured while somebody waits). When a
tenant has been served its next n requests, everybody else who waits has caught up with the counter
that it has then: that is how much is served before n places fall free. The time is rounded up to
whole seconds, as HTTP says it, and the place is kept for whoever of the tenant asks then: newcomers
get only places that nobody was promised, and who is refused meanwhile is told the time of the next
one. A promise that nobody claims lapses.
"""

from bisect import insort
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from math import ceil, exp

from shoal.server.engine.fairness import INPUT_PRICE, OUTPUT_PRICE, SCALE, Backlog
from shoal.server.engine.request import Request
from shoal.server.errors import Overloaded

# The least and the most that is said; the least also before anything was measured.
RETRY_AFTER_S = 1
RETRY_AFTER_MAX_S = 3600
# How long a promised place is kept: this, and a part of the time that was said.
KEPT_S = 2.0
KEPT_PART = 0.25
# Further promises are not remembered: so many clients do not come back in an orderly way.
PROMISES_MAX = 4096
# The measured rate follows the last seconds.
RATE_OVER_S = 10.0
# A little too late is better than a little too early.
MARGIN = 1.1


@dataclass(frozen=True, slots=True)
class DoorLimits:
    """What may wait: requests in all, of one tenant, and for how long (None: any time)."""

    max_waiting: int
    max_waiting_per_tenant: int
    max_wait_s: float | None = None


class Door:
    """Lets requests in. Not thread-safe."""

    def __init__(self, limits: DoorLimits) -> None:
        self.limits = limits
        self._known: dict[str, Backlog] = {}
        self._waiting: dict[str, Backlog] = {}  # those of the known with requests that wait
        self._queued = 0  # their requests
        self._entered: Counter[str] = Counter()  # let in since the queue was looked at
        self._taken: Counter[str] = Counter()  # those of them that the next look will show
        self._promises = _Promises()
        self._rate = _Rate()
        self._mean_output: float | None = None

    @property
    def num_waiting(self) -> int:
        """Requests let in that had not started when the queue was last looked at."""
        return self._queued + self._entered.total()

    def admit(self, request: Request, now_s: float) -> None:
        """Count a request in. Takes O(tenants that wait) when it is refused, or may be for the
        time it would wait.

        Raises:
            Overloaded: it may not wait; nothing changes but what the next is promised.
        """
        tenant, limits, promises = request.tenant, self.limits, self._promises
        promises.lapse(now_s)
        claims = promises.claim(tenant, now_s)
        mine, everybody = self._count(tenant), self.num_waiting
        # Newcomers leave the promised places alone; who claims one may have any that is free.
        kept = 0 if claims else promises.count(tenant)
        kept_by_all = 0 if claims else promises.total
        if mine + kept >= limits.max_waiting_per_tenant:
            free_after = mine + promises.count(tenant) + 1 - limits.max_waiting_per_tenant
            why = f"{mine} of your requests wait; the limit is {limits.max_waiting_per_tenant}"
            retry_s = self._wait_s(request, free_after, least=False)
        elif everybody + kept_by_all >= limits.max_waiting:
            free_after = everybody + promises.total + 1 - limits.max_waiting
            why = f"{everybody} requests are waiting; the limit is {limits.max_waiting}"
            retry_s = self._seconds(free_after * self._mean_price(self._waiting.values(), request))
        else:
            wait_s = 0.0
            if limits.max_wait_s is not None and everybody:
                wait_s = self._wait_s(request, mine + kept, least=True)
            if limits.max_wait_s is None or wait_s <= limits.max_wait_s:
                self._entered[tenant] += 1
                return
            behind = mine + promises.count(tenant)
            why = f"it would wait for {wait_s:.1f} s; the limit is {limits.max_wait_s:g} s"
            retry_s = self._wait_s(request, behind, least=False) - limits.max_wait_s
        after_s = min(max(ceil(retry_s * MARGIN), RETRY_AFTER_S), RETRY_AFTER_MAX_S)
        promises.make(tenant, now_s, after_s)
        raise Overloaded(f"{why}; try again in {after_s} s", retry_after_s=float(after_s))

    def take(self) -> None:
        """All that were let in so far will be in the queue, or gone, at the next look."""
        self._taken = self._entered.copy()

    def look(self, changes: Iterable[Backlog], service_total: int, now_s: float) -> None:
        """The queue as it is now: the tenants that changed, and what all were served so far."""
        self._rate.note(service_total, now_s, saturated=bool(self._waiting))
        for backlog in changes:
            before = self._waiting.pop(backlog.tenant, None)
            if before is not None:
                self._queued -= before.waiting
            if backlog.forgotten:
                self._known.pop(backlog.tenant, None)
                continue
            self._known[backlog.tenant] = backlog
            if backlog.mean_output is not None:
                self._mean_output = backlog.mean_output
            if backlog.waiting:
                self._waiting[backlog.tenant] = backlog
                self._queued += backlog.waiting
        if self._taken:
            self._entered -= self._taken
            self._taken.clear()

    # -- estimates ---------------------------------------------------------------------------

    def _count(self, tenant: str) -> int:
        backlog = self._waiting.get(tenant)
        return self._entered[tenant] + (backlog.waiting if backlog else 0)

    def _wait_s(self, request: Request, count: int, *, least: bool) -> float:
        """Seconds until its tenant was served ``count`` more requests, and others their due.

        Args:
            least: others send nothing more, so their due ends with what waits of theirs.
        """
        mine = self._known.get(request.tenant)
        level = min((other.counter for other in self._waiting.values()), default=0)
        counter = max(mine.counter, level) if mine else level
        price = count * self._mean_price([mine] if mine else [], request)
        until = counter + price * SCALE / request.weight
        total = price
        for tenant, other in self._waiting.items():
            if tenant != request.tenant:
                due = (until - other.counter) * other.weight / SCALE
                most = self._price(other) if least else due
                total += max(0.0, min(due, most))
        return self._seconds(total)

    def _price(self, backlog: Backlog) -> float:
        """What all that waits of a tenant will be charged, as it seems."""
        output: float = backlog.output_limit
        mean = backlog.mean_output
        if mean is None:
            mean = self._mean_output
        if mean is not None:
            output = min(output, mean * backlog.waiting)
        return INPUT_PRICE * backlog.input_tokens + OUTPUT_PRICE * output

    def _mean_price(self, backlogs: Collection[Backlog], request: Request) -> float:
        """What one of those that wait will be charged; ``request`` itself when none does."""
        count = sum(backlog.waiting for backlog in backlogs)
        if count:
            return sum(map(self._price, backlogs)) / count
        output: float = request.sampling.max_tokens
        if self._mean_output is not None:
            output = min(output, self._mean_output)
        return INPUT_PRICE * len(request.prompt_ids) + OUTPUT_PRICE * output

    def _seconds(self, price: float) -> float:
        return price / self._rate.per_s if self._rate.per_s else 0.0


class _Rate:
    """Price served in a second while somebody waited, the last seconds counting most."""

    def __init__(self) -> None:
        self.per_s = 0.0  # 0: not known yet
        self._served = self._seconds = 0.0
        self._total = 0
        self._at_s: float | None = None

    def note(self, total: int, now_s: float, *, saturated: bool) -> None:
        """``total`` was served by ``now_s``; somebody waited since the last note, or not."""
        if self._at_s is not None and saturated and now_s > self._at_s:
            passed = now_s - self._at_s
            fade = exp(-passed / RATE_OVER_S)
            self._served = self._served * fade + (total - self._total)
            self._seconds = self._seconds * fade + passed
            self.per_s = self._served / self._seconds
        self._at_s, self._total = now_s, total


class _Promises:
    """When places were promised to whom; times are those at which they may be claimed."""

    def __init__(self) -> None:
        self.total = 0
        self._times: dict[str, list[tuple[float, float]]] = {}  # (from, until), by the first
        self._swept_s = 0.0

    def count(self, tenant: str) -> int:
        return len(self._times.get(tenant, ()))

    def make(self, tenant: str, now_s: float, after_s: int) -> None:
        if self.total < PROMISES_MAX:
            since = now_s + after_s
            until = since + KEPT_S + KEPT_PART * after_s
            insort(self._times.setdefault(tenant, []), (since, until))
            self.total += 1

    def claim(self, tenant: str, now_s: float) -> bool:
        """Use up the oldest promise whose time has come, if there is one."""
        times = self._times.get(tenant)
        if not times or times[0][0] > now_s:
            return False
        del times[0]
        self.total -= 1
        return True

    def lapse(self, now_s: float) -> None:
        """Forget what nobody claimed; looks at all of them once a second."""
        if 0 <= now_s - self._swept_s < 1.0:
            return
        self._swept_s = now_s
        for tenant, times in list(self._times.items()):
            kept = [span for span in times if span[1] > now_s]
            self.total -= len(times) - len(kept)
            if kept:
                self._times[tenant] = kept
            else:
                del self._times[tenant]
