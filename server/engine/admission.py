"""Whether a request may wait, and if not, when it should come back.

Pure; ``EngineLoop`` guards it with its lock, asks it about each request and tells it after each
step what changed in the queue. A request is refused when too many wait, or too many of its tenant,
or when it would start later than a limit.

*When to come back.* The engine serves so much a second (measured while somebody waits). When a
tenant has been served its next n requests, everybody else who waits has caught up with the counter
that it has then: that is how much is served before n places fall free. The time is rounded up to
whole seconds, as HTTP says it, and the place is kept for the same request (tenant, prompt and
parameters): others get what is left when all promises are kept, and who is refused meanwhile is
told the time of the next place. A promise that nobody claims lapses. A tenant with less than its
share of the places does not stand back behind what others were promised: one tenant could have all
of them promised to it, for hours, and come for none.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, exp, inf, sqrt

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
PROMISES_MAX = 1024
# By how much a promised place may be beyond the longest wait.
SLACK = 2
# The measured rate follows the last seconds.
RATE_OVER_S = 10.0
# There may be thousands of tenants, and thousands of steps a second.
NOTE_EVERY_S = 0.25
# Requests start as irregularly as a Poisson process has events: nine times in ten there were n of
# them after the time of n + LATER * (sqrt(n) + 1).
LATER = 1.3

_Span = tuple[float, float]  # a promised place is there from, and until


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
        self._rates: dict[str, _Rate] = {}  # of the tenants that wait
        self._noted_s = -1.0
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
        # Who was refused asks the same again; a hash is enough to tell.
        key = hash((tenant, request.prompt_ids, request.sampling))
        since = promises.since(key)
        due = since is not None and since <= now_s
        if due:
            promises.claim(tenant, key)
        mine, everybody = self._count(tenant), self.num_waiting
        own, room = promises.of(tenant), limits.max_waiting_per_tenant
        why = f"{mine} of your requests wait, and {room} may"
        each_s = 0.0
        if limits.max_wait_s is not None or mine + len(own) >= room:
            each_s = self._wait_s(request, mine or 1) / (mine or 1)
        if limits.max_wait_s is not None:
            # A promise is kept though the estimate it came from was a little off.
            most_s = limits.max_wait_s * (SLACK if due else 1)
            wait_s = self._wait_s(request, mine)
            if wait_s > most_s:
                room = min(mine, int(limits.max_wait_s / each_s))
                why = f"it would wait for {wait_s:.1f} s, and the limit is {most_s:g} s"
        if due and mine < room and everybody < limits.max_waiting:
            self._entered[tenant] += 1
            return
        free_s = _free_after(mine, own, room, each_s, now_s)
        if free_s is None:
            each_s = 0.0
            if everybody + len(promises) >= limits.max_waiting:
                each_s = self._seconds(self._mean_price(self._waiting.values(), request))
            why = f"{everybody} requests wait, and {limits.max_waiting} may"
            free_s = _free_after(everybody, promises.all, limits.max_waiting, each_s, now_s)
            if free_s is not None and mine + len(own) < self._share(tenant):
                # Else one tenant, refused again and again, would have all places promised to it.
                free_s = _free_after(everybody, own, limits.max_waiting, each_s, now_s)
        if free_s is None:
            if since is not None and not due:  # too early, and there is a place all the same
                promises.claim(tenant, key)
            self._entered[tenant] += 1
            return
        if since is not None and not due:
            after_s = max(ceil(since - now_s), RETRY_AFTER_S)
        else:
            after_s = min(max(ceil(free_s), RETRY_AFTER_S), RETRY_AFTER_MAX_S)
            promises.make(tenant, key, now_s, after_s)
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
            if not backlog.waiting:
                self._rates.pop(backlog.tenant, None)
            if backlog.forgotten:
                self._known.pop(backlog.tenant, None)
                continue
            self._known[backlog.tenant] = backlog
            if backlog.mean_output is not None:
                self._mean_output = backlog.mean_output
            if backlog.waiting:
                self._waiting[backlog.tenant] = backlog
                self._queued += backlog.waiting
        if not 0 <= now_s - self._noted_s < NOTE_EVERY_S:
            self._noted_s = now_s
            for tenant, backlog in self._waiting.items():
                rate = self._rates.get(tenant) or self._rates.setdefault(tenant, _Rate())
                served = backlog.counter * backlog.weight / SCALE
                rate.note(served, now_s, saturated=True)
        if self._taken:
            self._entered -= self._taken
            self._taken.clear()

    # -- estimates ---------------------------------------------------------------------------

    def _count(self, tenant: str) -> int:
        backlog = self._waiting.get(tenant)
        return self._entered[tenant] + (backlog.waiting if backlog else 0)

    def _share(self, tenant: str) -> int:
        """Places that nobody else's promises keep ``tenant`` from."""
        tenants = {*self._waiting, *self._entered, *self._promises.tenants, tenant}
        return max(1, self.limits.max_waiting // len(tenants))

    def _wait_s(self, request: Request, count: int) -> float:
        """Seconds until its tenant was served ``count`` more requests, and others their due."""
        mine = self._known.get(request.tenant)
        level = min((other.counter for other in self._waiting.values()), default=0)
        counter = max(mine.counter, level) if mine else level
        price = count * self._mean_price([mine] if mine else [], request)
        until = counter + price * SCALE / request.weight
        total = price
        for tenant, other in self._waiting.items():
            if tenant != request.tenant:
                total += max(0.0, (until - other.counter) * other.weight / SCALE)
        # Those who do not wait just now, but did and will, show in what it was really served.
        rate = self._rates.get(request.tenant)
        return max(self._seconds(total), price / rate.per_s if rate and rate.per_s else 0.0)

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


def _free_after(
    waiting: int, promised: Sequence[_Span], room: int, each_s: float, now_s: float
) -> float | None:
    """None if one more may wait now, else the seconds until there is a place beyond the promised.

    Args:
        waiting: how many wait, of at most ``room``.
        promised: when places were promised, by time.
        each_s: seconds between two starts, on average.
    """
    free = room - waiting
    if free > 0 and (
        free > len(promised)
        or all(
            index < free - 1 + _starts((since - now_s) / each_s if each_s else inf)
            for index, (since, _) in enumerate(promised)
        )
    ):
        return None
    count = len(promised) + 1 - free
    return each_s * (count + LATER * (sqrt(max(count, 0)) + 1))


def _starts(average: float) -> float:
    """How many there are nine times in ten when there are ``average`` on average."""
    left = average - LATER
    return (sqrt(LATER**2 / 4 + left) - LATER / 2) ** 2 if left > 0 else 0.0


class _Rate:
    """Price served in a second while somebody waited, the last seconds counting most."""

    def __init__(self) -> None:
        self.per_s = 0.0  # 0: not known yet
        self._served = self._seconds = 0.0
        self._total = 0.0
        self._at_s: float | None = None

    def note(self, total: float, now_s: float, *, saturated: bool) -> None:
        """``total`` was served by ``now_s``; somebody waited since the last note, or not."""
        if self._at_s is not None and saturated and now_s > self._at_s:
            passed = now_s - self._at_s
            fade = exp(-passed / RATE_OVER_S)
            self._served = self._served * fade + (total - self._total)
            self._seconds = self._seconds * fade + passed
            self.per_s = self._served / self._seconds
        self._at_s, self._total = now_s, total


class _Promises:
    """When places were promised to whom."""

    def __init__(self) -> None:
        self.all: list[_Span] = []
        self._of: dict[str, list[_Span]] = {}
        self._by_key: dict[int, _Span] = {}
        self._now_s = self._swept_s = 0.0

    def __len__(self) -> int:
        return len(self.all)

    @property
    def tenants(self) -> Collection[str]:
        """Who was promised something that has not lapsed, or did so just now."""
        return self._of.keys()

    def of(self, tenant: str) -> Sequence[_Span]:
        """By time."""
        return self._of.get(tenant, ())

    def since(self, key: int) -> float | None:
        """When the request's place is there; None if it has none."""
        span = self._by_key.get(key)
        return None if span is None else span[0]

    def make(self, tenant: str, key: int, now_s: float, after_s: int) -> None:
        if len(self.all) < PROMISES_MAX:
            since = now_s + after_s
            span = since, since + KEPT_S + KEPT_PART * after_s
            insort(self._of.setdefault(tenant, []), span)
            insort(self.all, span)
            self._by_key[key] = span

    def claim(self, tenant: str, key: int) -> None:
        """Use up the request's promise."""
        span = self._by_key.pop(key)
        for spans in (self.all, self._of[tenant]):
            del spans[bisect_left(spans, span)]

    def lapse(self, now_s: float) -> None:
        """Forget what nobody claimed, and everything when the clock goes back.

        Looks at all of them once a second.
        """
        if now_s < self._now_s:
            self.all, self._of, self._by_key, self._swept_s = [], {}, {}, now_s
        self._now_s = now_s
        if now_s - self._swept_s < 1.0:
            return
        self._swept_s = now_s
        self.all = [span for span in self.all if span[1] > now_s]
        self._by_key = {key: span for key, span in self._by_key.items() if span[1] > now_s}
        for tenant, spans in list(self._of.items()):
            self._of[tenant] = [span for span in spans if span[1] > now_s]
            if not self._of[tenant]:
                del self._of[tenant]
