"""How much an owner may ask for: requests and tokens a minute, and requests at a time.

Pure and thread-safe. Rates are token buckets that hold one minute's worth: after a pause an owner
may take that at once, so in no minute more than twice the limit, and in the long run no more than
the limit. A request is charged for its tokens as they are known, which may bring the bucket into
debt; then the next is let in when there is one token again.

What is refused takes nothing, nor does what the engine refuses later (``Grant.take_back``). So for
the rates ``retry_after_s`` is exact: without other requests of the owner in between, trying again
then succeeds, and before that fails. When a request in progress will end is not known; for those it
is an estimate from how long the owner's took lately.

An owner without requests in progress is forgotten as soon as its buckets are full. Every server
process counts for itself.
"""

import math
import threading
from collections.abc import Callable
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from shoal.server.errors import Overloaded

if TYPE_CHECKING:  # pulls in the database's library
    from shoal.adapters.registry.keys import Limits

MINUTE_S = 60.0
# Said of a limit of 0, which only the operator can change.
CLOSED_RETRY_S = 3600.0
# Between these is what is said while too many are in progress.
BUSY_RETRY_MIN_S = 0.1
BUSY_RETRY_MAX_S = 60.0
# Requests that may end before their mean duration follows the latest.
_MEAN_OVER = 16
# Clocks and sums round: whoever comes as early as this is not too early.
_EARLY_S = 1e-6


class _Bucket:
    """What was taken and has not come back yet; up to ``limit`` of it may be out.

    Attributes:
        limit: a minute's worth, at least 1.
        out: above ``limit`` there is a debt.
    """

    __slots__ = ("_at", "limit", "out")

    def __init__(self, limit: int, now: float) -> None:
        self.limit = limit
        self.out = 0.0
        self._at = now

    def wait_s(self, now: float) -> float:
        """How long until there is one to take."""
        self._refill(now)
        wait_s = (self.out + 1 - self.limit) * MINUTE_S / self.limit
        return wait_s if wait_s > _EARLY_S else 0.0

    def full_in_s(self, now: float) -> float:
        """How long until nothing is out."""
        self._refill(now)
        return self.out * MINUTE_S / self.limit

    def take(self, count: int, now: float) -> None:
        self._refill(now)
        self.out += count

    def _refill(self, now: float) -> None:
        self.out = max(0.0, self.out - (now - self._at) * self.limit / MINUTE_S)
        self._at = now


class _Buckets:
    """What an owner took of one thing, once for each limit on it that its keys have.

    They come back at the rate of their limit. One bucket whose rate were that of the latest key
    would let a key with a low limit slow the others down, even by being refused.
    """

    __slots__ = ("_by_limit",)

    def __init__(self) -> None:
        self._by_limit: dict[int, _Bucket] = {}

    @property
    def out(self) -> float:
        return max((bucket.out for bucket in self._by_limit.values()), default=0.0)

    def of(self, limit: int, now: float) -> _Bucket:
        """The bucket of ``limit``. At first, what is out by the other limits is out."""
        bucket = self._by_limit.get(limit)
        if bucket is None:
            bucket = _Bucket(limit, now)
            for other in list(self._by_limit.values()):
                if other.full_in_s(now) == 0.0:
                    del self._by_limit[other.limit]
            bucket.out = self.out
            self._by_limit[limit] = bucket
        return bucket

    def take(self, limit: int, count: int, now: float) -> None:
        """Take ``count`` within ``limit``.

        A lower limit is told of no more than what is out by this one: what this one allows, and
        has back already, must not be owed for hours by another key.
        """
        mine = self.of(limit, now)
        mine.take(count, now)
        for other in self._by_limit.values():
            if other.limit > limit:
                other.take(count, now)
            elif other is not mine:
                other.take(0, now)
                other.out = max(other.out, min(other.out + count, mine.out))

    def take_back(self, limit: int, count: int, now: float) -> None:
        """Undo a ``take``."""
        for bucket in self._by_limit.values():
            if bucket.limit >= limit:
                bucket.take(0, now)
                bucket.out = max(0.0, bucket.out - count)

    def full_in_s(self, now: float) -> float:
        """How long until nothing is out."""
        return max((bucket.full_in_s(now) for bucket in self._by_limit.values()), default=0.0)

    def check(self) -> None:
        """Assert every invariant."""
        for limit, bucket in self._by_limit.items():
            assert limit == bucket.limit > 0
            assert bucket.out >= 0


class _Owner:
    """What one owner took of that for which its keys have limits, and its requests in progress.

    Attributes:
        started: by grant, when it began; the oldest first.
        mean_s: how long its requests took lately; None before the first has ended.
        listed: there is an entry of it among those that may be forgotten.
    """

    __slots__ = ("listed", "mean_s", "name", "requests", "started", "tokens")

    def __init__(self, name: str) -> None:
        self.name = name
        self.requests = _Buckets()
        self.tokens = _Buckets()
        self.started: dict[Grant, float] = {}
        self.mean_s: float | None = None
        self.listed = False

    def full_in_s(self, now: float) -> float:
        return max(self.requests.full_in_s(now), self.tokens.full_in_s(now))

    def free_in_s(self, most: int, now: float) -> float:
        """About how long until fewer than ``most`` are in progress."""
        running = len(self.started)
        oldest = next(iter(self.started.values()))
        # Until one has ended: it takes at least as long as it has taken.
        mean_s = now - oldest if self.mean_s is None else self.mean_s
        # Of n that take m on average, one ends every m / n.
        wait_s = mean_s / running * (running - most + 1)
        return min(max(wait_s, BUSY_RETRY_MIN_S), BUSY_RETRY_MAX_S)


class Grant:
    """A request that was let in; ``end`` it however it ends, best with ``with``."""

    __slots__ = ("_limits", "_owner", "_quotas", "_tokens")

    def __init__(self, quotas: "Quotas", owner: _Owner, limits: "Limits") -> None:
        self._quotas = quotas
        self._owner = owner
        self._limits = limits
        self._tokens = 0

    def charge(self, tokens: int) -> None:
        """It took ``tokens``, of its prompt or answer. Nothing happens once it has ended."""
        assert tokens >= 0
        if self._limits.tokens_per_minute is not None:
            self._quotas._charge(self, self._owner, tokens)

    def take_back(self) -> None:
        """It got nothing: end it as if it had never been let in."""
        self._quotas._end(self, self._owner, take_back=True)

    def end(self) -> None:
        """It is over. Twice is once."""
        self._quotas._end(self, self._owner)

    def __enter__(self) -> "Grant":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class Quotas:
    """The accounts of all owners with requests.

    Args:
        clock: monotonic seconds. One that jumps back does no more than stand still.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._last = clock()
        self._now = 0.0
        self._owners: dict[str, _Owner] = {}
        # A heap: when an owner that had no requests may have full buckets; one entry an owner.
        self._idle: list[tuple[float, int, _Owner]] = []
        self._ticket = 0

    def __len__(self) -> int:
        """Owners of which something is remembered."""
        with self._lock:
            self._advance()
            return len(self._owners)

    def begin(self, owner: str, limits: "Limits") -> Grant:
        """Let a request in.

        Args:
            limits: of its key. Where the owner's keys differ, what was taken with all of them is
                held against those of the one at hand; what was taken without a limit is not.

        Raises:
            Overloaded: a limit is reached; nothing was taken. It says which and until when.
        """
        with self._lock:
            now = self._advance()
            account = self._owners.get(owner)
            if account is None:
                account = _Owner(owner)
            _refuse_closed(limits)
            waits = [
                _wait(account.requests, limits.requests_per_minute, "requests a minute", now),
                _wait(account.tokens, limits.tokens_per_minute, "tokens a minute", now),
                _wait_for_others(account, limits.concurrent_requests, now),
            ]
            wait_s, what = max(waits)
            if wait_s > 0:
                raise _overloaded(what, wait_s)
            if limits.requests_per_minute is not None:
                account.requests.take(limits.requests_per_minute, 1, now)
            grant = Grant(self, account, limits)
            account.started[grant] = now
            self._owners[owner] = account
            return grant

    def check(self) -> None:
        """Assert every invariant."""
        with self._lock:
            assert len(self._idle) == sum(account.listed for account in self._owners.values())
            for _, _, account in self._idle:
                assert self._owners.get(account.name) is account
            for account in self._owners.values():
                assert account.started or account.listed, "remembered for nothing"
                account.requests.check()
                account.tokens.check()

    def _charge(self, grant: Grant, account: _Owner, tokens: int) -> None:
        limit = grant._limits.tokens_per_minute
        assert limit is not None
        with self._lock:
            if grant in account.started:
                account.tokens.take(limit, tokens, self._advance())
                grant._tokens += tokens

    def _end(self, grant: Grant, account: _Owner, *, take_back: bool = False) -> None:
        with self._lock:
            now = self._advance()
            began = account.started.pop(grant, None)
            if began is None:
                return
            if take_back:
                limits = grant._limits
                if limits.requests_per_minute is not None:
                    account.requests.take_back(limits.requests_per_minute, 1, now)
                if limits.tokens_per_minute is not None:
                    account.tokens.take_back(limits.tokens_per_minute, grant._tokens, now)
                self._set_aside(account, now)
                return
            if account.mean_s is None:
                account.mean_s = now - began
            else:
                account.mean_s += (now - began - account.mean_s) / _MEAN_OVER
            self._set_aside(account, now)

    def _advance(self) -> float:
        """The time, which only goes forward; what is due by then is forgotten."""
        clock = self._clock()
        self._now += max(0.0, clock - self._last)
        self._last = clock
        while self._idle and self._idle[0][0] <= self._now:
            _, _, account = heappop(self._idle)
            account.listed = False
            self._set_aside(account, self._now)
        return self._now

    def _set_aside(self, account: _Owner, now: float) -> None:
        """Forget ``account`` when it has nothing that counts, or look again when it may."""
        if account.started or account.listed or self._owners.get(account.name) is not account:
            return
        full_in_s = account.full_in_s(now)
        if full_in_s <= _EARLY_S:
            del self._owners[account.name]
        else:
            account.listed = True
            self._ticket += 1
            heappush(self._idle, (now + full_in_s, self._ticket, account))


def _refuse_closed(limits: "Limits") -> None:
    for limit, what in (
        (limits.requests_per_minute, "requests a minute"),
        (limits.tokens_per_minute, "tokens a minute"),
        (limits.concurrent_requests, "requests at a time"),
    ):
        if limit == 0:
            raise _overloaded(f"0 {what}", CLOSED_RETRY_S)


def _wait(buckets: _Buckets, limit: int | None, what: str, now: float) -> tuple[float, str]:
    if limit is None:
        return 0.0, ""
    return buckets.of(limit, now).wait_s(now), f"{limit} {what}"


def _wait_for_others(account: _Owner, most: int | None, now: float) -> tuple[float, str]:
    if most is None or len(account.started) < most:
        return 0.0, ""
    return account.free_in_s(most, now), f"{most} requests at a time"


def _overloaded(limit: str, wait_s: float) -> Overloaded:
    return Overloaded(
        f"this key's limit is {limit}; try again in {math.ceil(wait_s)} s", retry_after_s=wait_s
    )
