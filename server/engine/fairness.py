"""Whose request is next: a virtual token counter for each tenant, the smallest first.

Pure. After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024), algorithm 2. A
tenant's counter grows by what it is served: ``INPUT_PRICE`` for each prompt token that has to be
computed, when the request starts; ``OUTPUT_PRICE`` for each token sampled, when it is known; both
divided by the tenant's weight. What preemption makes the server compute again is not charged, nor
are prompt tokens found in the prefix cache: they took nothing from anybody.

A tenant that begins to wait is lifted to the smallest counter among those that wait or, when
nobody does, to that of the tenant that waited last: being idle earns no credit. That is also why
most idle tenants can be forgotten: a counter at or below that level would be lifted anyway. Those
above it are kept, at most ``IDLE_MAX`` of them; beyond that the level itself rises to the lowest,
so that nobody gains by being forgotten.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from heapq import heapify, heappop, heappush, heapreplace
from operator import attrgetter
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

INPUT_PRICE = 1
OUTPUT_PRICE = 2
# Counter units for one unit of price at weight 1. Rounding loses less than a unit a charge.
SCALE = 1 << 20
WEIGHT_MAX = 1 << 10
# Counters kept of tenants that have no request: those that were served more than who waits.
IDLE_MAX = 4096
# Requests that one tenant may see ended before its mean output follows the latest.
_MEAN_OVER = 16

_ORDER = attrgetter("order")


class Waiting(Protocol):
    """What waits; a ``Sequence`` is one.

    Attributes:
        order: when it was accepted; lower is older, and first within its tenant.
        account: its tenant's.
        input_tokens, output_limit: what it may still be charged for.
    """

    @property
    def order(self) -> int: ...
    @property
    def account(self) -> "Account": ...
    @property
    def input_tokens(self) -> int: ...
    @property
    def output_limit(self) -> int: ...


W = TypeVar("W", bound=Waiting)


class Backlog(NamedTuple):
    """One tenant's part of the queue, as ``admission.py`` is told of it.

    Attributes:
        counter: in units of price times ``SCALE``, divided by ``weight``.
        waiting: its requests that wait.
        input_tokens, output_limit: what these may be charged for.
        mean_output: tokens that its requests made lately, or None.
        forgotten: nothing is known of it any more, and the rest is meaningless.
    """

    tenant: str
    counter: int
    weight: int
    waiting: int
    input_tokens: int
    output_limit: int
    mean_output: float | None
    forgotten: bool


class Account:
    """A tenant that has requests, or had and was served more than those that wait.

    Attributes:
        weight: its share, relative to the others'; that of its latest request.
        counter: as ``Backlog.counter``; never falls.
        live: its requests that have not ended, running ones included.
        waiting: those that wait, by order.
        mean_output: tokens that its requests made lately, or None.
    """

    __slots__ = (
        "counter",
        "input_tokens",
        "joined",
        "listed",
        "live",
        "mean_output",
        "output_limit",
        "skipped",
        "tenant",
        "waiting",
        "weight",
    )

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.weight = 1
        self.counter = 0
        self.live = 0
        self.waiting: list[Any] = []
        self.input_tokens = self.output_limit = 0  # of those that wait
        self.mean_output: float | None = None
        self.joined = 0  # when it began to wait; decides between equal counters
        self.listed = False  # there is an entry of it among the turns
        self.skipped = 0  # of ``waiting``, passed over since the last ``rewind``

    def note_output(self, tokens: int) -> None:
        """A request of it ended after ``tokens`` tokens."""
        if self.mean_output is None:
            self.mean_output = float(tokens)
        else:
            self.mean_output += (tokens - self.mean_output) / _MEAN_OVER


class FairQueue(Generic[W]):
    """Requests that wait, in the order in which they should start. Not thread-safe.

    ``peek`` names the next; ``take`` removes it, ``skip`` passes it over until ``rewind``. Each is
    O(log tenants), amortised: an entry's key may lag behind its counter, which only grows, and is
    put right when the entry comes to the top.
    """

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}
        self._turns: list[tuple[int, int, Account]] = []  # a heap
        self._aside: list[Account] = []  # all they have was passed over
        self._skipping: list[Account] = []
        self._idle: list[tuple[int, int, Account]] = []  # a heap; entries may be out of date
        self._changed: dict[Account, None] = {}
        self._last: Account | None = None  # the tenant that stopped waiting last
        self._level = 0
        self._length = self._tenants = self._ticket = 0
        self.service = 0  # charged in all, in units of price, whatever the weights

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[W]:
        """All that wait, in no order that matters."""
        for account in self._accounts.values():
            yield from account.waiting

    @property
    def num_accounts(self) -> int:
        """Tenants of which something is remembered."""
        return len(self._accounts)

    def open(self, tenant: str, weight: int) -> Account:
        """The account that a new request of ``tenant`` is charged to; ``close`` it at its end."""
        assert 1 <= weight <= WEIGHT_MAX
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = Account(tenant)
        account.weight = weight
        account.live += 1
        return account

    def close(self, account: Account) -> None:
        """A request has ended; it waits no longer."""
        account.live -= 1
        if account.live:
            return
        self._raise_level()
        if account.counter > self._level:
            heappush(self._idle, (account.counter, self._number(), account))
        else:
            self._forget(account)
        while self._idle and (self._idle[0][0] <= self._level or len(self._idle) > IDLE_MAX):
            counter, _, account = heappop(self._idle)
            current = self._accounts.get(account.tenant) is account
            if current and not account.live and account.counter == counter:
                self._level = max(self._level, counter)
                self._forget(account)

    def charge(self, account: Account, price: int) -> None:
        """``account``'s tenant was served."""
        account.counter += price * SCALE // account.weight
        self.service += price
        self._changed[account] = None

    def put(self, item: W) -> None:
        """``item`` waits, behind the older ones of its tenant and before the younger."""
        account = item.account
        if not account.waiting:
            self._join(account)
        insort(account.waiting, item, key=_ORDER)
        account.input_tokens += item.input_tokens
        account.output_limit += item.output_limit
        self._length += 1
        self._changed[account] = None

    def remove(self, item: W) -> None:
        """``item`` waits no longer; not between ``peek`` and ``rewind``."""
        account = item.account
        index = bisect_left(account.waiting, item.order, key=_ORDER)
        assert account.waiting[index] is item
        self._pop(account, index)

    def peek(self) -> W | None:
        """The next that was not passed over, of the tenant whose counter is the smallest."""
        account = self._top()
        if account is None:
            return None
        item: W = account.waiting[account.skipped]
        return item

    def take(self) -> None:
        """What ``peek`` named starts."""
        account = self._turns[0][2]
        self._pop(account, account.skipped)
        self._set_aside(account, len(account.waiting))

    def skip(self, most: int) -> None:
        """Pass over what ``peek`` named, and all of its tenant's once ``most`` of them were."""
        account = self._turns[0][2]
        if not account.skipped:
            self._skipping.append(account)
        account.skipped += 1
        self._set_aside(account, min(most, len(account.waiting)))

    def rewind(self) -> None:
        """What was passed over can be named again."""
        for account in self._skipping:
            account.skipped = 0
        for account in self._aside:
            self._list(account)
        self._skipping.clear()
        self._aside.clear()

    @property
    def num_tenants(self) -> int:
        """Tenants with requests that wait."""
        return self._tenants

    def changes(self) -> list[Backlog]:
        """Accounts that changed since the last call."""
        changed = [
            Backlog(
                account.tenant,
                account.counter,
                account.weight,
                len(account.waiting),
                account.input_tokens,
                account.output_limit,
                account.mean_output,
                self._accounts.get(account.tenant) is not account,
            )
            for account in self._changed
            if self._accounts.get(account.tenant, account) is account
        ]
        self._changed.clear()
        return changed

    def check(self) -> None:
        """Assert every invariant; not between ``peek`` and ``rewind``."""
        accounts = self._accounts.values()
        assert self._length == sum(len(account.waiting) for account in accounts)
        assert self._tenants == sum(bool(account.waiting) for account in accounts)
        assert not self._aside
        assert len(self._idle) <= IDLE_MAX
        assert len(self._turns) == len({account for _, _, account in self._turns})
        keys = {account: (counter, joined) for counter, joined, account in self._turns}
        idle = {account for _, _, account in self._idle}
        for account in accounts:
            orders = [item.order for item in account.waiting]
            assert orders == sorted(orders)
            assert len(orders) <= account.live
            assert account.live or account in idle, "remembered for nothing"
            assert account.input_tokens == sum(item.input_tokens for item in account.waiting)
            assert account.output_limit == sum(item.output_limit for item in account.waiting)
            assert not account.skipped
            assert account.listed == (account in keys)
            if account.waiting:
                assert keys[account] <= (account.counter, account.joined), "its turn is too late"

    # -- turns ------------------------------------------------------------------------------

    def _top(self) -> Account | None:
        turns = self._turns
        while turns:
            counter, joined, account = turns[0]
            if not account.waiting:
                account.listed = False
                heappop(turns)
            elif counter != account.counter or joined != account.joined:
                heapreplace(turns, (account.counter, account.joined, account))
            else:
                return account
        return None

    def _set_aside(self, account: Account, most: int) -> None:
        """Unless it has one that can be named. Its entry is on top."""
        if account.waiting and account.skipped >= most:
            heappop(self._turns)
            account.listed = False
            self._aside.append(account)

    def _join(self, account: Account) -> None:
        self._raise_level()
        account.counter = max(account.counter, self._level)
        account.joined = self._number()
        self._tenants += 1
        if not account.listed:
            self._list(account)

    def _list(self, account: Account) -> None:
        if len(self._turns) > 2 * self._tenants + 64:  # mostly of tenants that wait no longer
            for _, _, other in self._turns:
                other.listed = bool(other.waiting)
            self._turns = [turn for turn in self._turns if turn[2].listed]
            heapify(self._turns)
        account.listed = True
        heappush(self._turns, (account.counter, account.joined, account))

    def _pop(self, account: Account, index: int) -> None:
        item = account.waiting.pop(index)
        account.input_tokens -= item.input_tokens
        account.output_limit -= item.output_limit
        self._length -= 1
        self._changed[account] = None
        if not account.waiting:
            self._tenants -= 1
            self._last = account

    # -- what a newcomer begins with, and who can be forgotten --------------------------------

    def _raise_level(self) -> None:
        account = self._top() or self._last
        if account is not None:
            self._level = max(self._level, account.counter)

    def _forget(self, account: Account) -> None:
        del self._accounts[account.tenant]
        self._changed[account] = None

    def _number(self) -> int:
        self._ticket += 1
        return self._ticket
