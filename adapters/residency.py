"""What stays in a tier of bounded bytes: by frequency and recency, never what is in use.

Pure bookkeeping of keys and sizes; ``host_tier.py`` owns the bytes. The policy is S3-FIFO (Yang
et al., "FIFO Queues are All You Need for Cache Eviction", SOSP 2023), counted in bytes and with
pins:

- A new key waits in the *small* queue, a tenth of the bytes. When its turn to leave comes, it goes
  on to the *main* queue if it was used again meanwhile, else it leaves. So a scan of keys that are
  each used once passes through the tenth and leaves the rest alone.
- The main queue gives a key another round for each use, three at most.
- What left unused is remembered as a *ghost* for a while, and if it comes back goes to the main
  queue at once.

Pinned keys are in no queue; the last ``unpin`` puts a key at the end of the one it belongs to, so
that order is also that of last use. Every operation takes O(1), amortised over the uses.
"""

from collections import OrderedDict
from dataclasses import dataclass

# Uses that are remembered, and with that how many rounds a key may stay without any.
USES_MAX = 3
SMALL_SHARE = 0.1


@dataclass(slots=True)
class _Entry:
    size: int
    main: bool
    pins: int = 0
    uses: int = 0


class Residency:
    """Which keys are resident in ``capacity`` bytes; not thread-safe.

    Memory: about 200 bytes a resident key beside the key, and 300 a ghost with its key (64
    characters); there are never more ghosts than resident keys.
    """

    def __init__(self, capacity: int) -> None:
        if capacity <= 0:
            raise ValueError(f"capacity is {capacity}, must be positive")
        self.capacity = capacity
        self._small_target = int(capacity * SMALL_SHARE)
        self._entries: dict[str, _Entry] = {}
        self._small: OrderedDict[str, _Entry] = OrderedDict()
        self._main: OrderedDict[str, _Entry] = OrderedDict()
        self._ghosts: OrderedDict[str, None] = OrderedDict()
        self._used = 0
        self._pinned = 0
        self._small_bytes = 0  # of unpinned keys

    @property
    def used(self) -> int:
        """Bytes of all resident keys."""
        return self._used

    @property
    def pinned(self) -> int:
        """Bytes of those in use."""
        return self._pinned

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def room(self, size: int) -> bool:
        """Whether a new key of that size would be taken."""
        return size <= self.capacity - self._pinned

    def add(self, key: str, size: int, *, pin: bool = False) -> list[str]:
        """Make a new ``key`` resident; returns those that had to leave.

        The caller has asked whether there is ``room``.
        """
        assert key not in self._entries, f"{key} is resident"
        assert self.room(size), f"no room for {size} bytes"
        victims = []
        while self._used + size > self.capacity:
            victim = self._evict()
            if victim is not None:
                victims.append(victim)
        known = key in self._ghosts
        if known:
            del self._ghosts[key]
        entry = self._entries[key] = _Entry(size, main=known)
        self._used += size
        if pin:
            entry.pins = 1
            self._pinned += size
        else:
            self._enqueue(key, entry)
        return victims

    def use(self, key: str) -> None:
        """Count a use of a resident key."""
        entry = self._entries[key]
        entry.uses = min(entry.uses + 1, USES_MAX)
        if not entry.pins:
            (self._main if entry.main else self._small).move_to_end(key)

    def pin(self, key: str) -> None:
        """Count a use of a resident key and keep it until as many ``unpin``."""
        entry = self._entries[key]
        if not entry.pins:
            self._dequeue(key, entry)
            self._pinned += entry.size
        entry.pins += 1
        entry.uses = min(entry.uses + 1, USES_MAX)

    def unpin(self, key: str) -> None:
        """Undo one pin."""
        entry = self._entries.get(key)
        assert entry is not None, f"unpin of {key}, which is not pinned"
        assert entry.pins > 0, f"unpin of {key}, which is not pinned"
        entry.pins -= 1
        if not entry.pins:
            self._pinned -= entry.size
            self._enqueue(key, entry)

    def check(self) -> None:
        """Assert the invariants; O(n), for tests."""
        entries = self._entries
        assert self._used == sum(entry.size for entry in entries.values()) <= self.capacity
        assert self._pinned == sum(entry.size for entry in entries.values() if entry.pins)
        assert self._small_bytes == sum(entry.size for entry in self._small.values())
        queued = {key for key, entry in entries.items() if not entry.pins}
        assert queued == self._small.keys() | self._main.keys()
        assert not self._small.keys() & self._main.keys()
        assert not any(entry.main for entry in self._small.values())
        assert all(entry.main for entry in self._main.values())
        assert not self._ghosts.keys() & entries.keys()
        assert len(self._ghosts) <= max(len(entries), 1)

    def _evict(self) -> str | None:
        """One step towards room: somebody leaves, moves on, or gets another round."""
        if self._small and (self._small_bytes > self._small_target or not self._main):
            key, entry = self._small.popitem(last=False)
            self._small_bytes -= entry.size
            if entry.uses:
                entry.main, entry.uses = True, 0
                self._main[key] = entry
                return None
            self._ghosts[key] = None
        else:
            key, entry = self._main.popitem(last=False)
            if entry.uses:
                entry.uses -= 1
                self._main[key] = entry
                return None
        del self._entries[key]
        self._used -= entry.size
        while len(self._ghosts) > max(len(self._entries), 1):
            self._ghosts.popitem(last=False)
        return key

    def _enqueue(self, key: str, entry: _Entry) -> None:
        if entry.main:
            self._main[key] = entry
        else:
            self._small[key] = entry
            self._small_bytes += entry.size

    def _dequeue(self, key: str, entry: _Entry) -> None:
        if entry.main:
            del self._main[key]
        else:
            del self._small[key]
            self._small_bytes -= entry.size
