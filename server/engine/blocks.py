"""Who holds which KV block: reference counts, the free list, and idle blocks worth keeping.

Pure. Knows nothing of tokens; ``prefix_cache.py`` decides which blocks are worth keeping.

A block is *free* (its content is worthless), *idle* (nobody holds it, but its content may be
reused) or *used* (held by one sequence or more). Free and idle blocks can both be allocated;
idle ones go last, least recently released first.
"""

from collections.abc import Callable, Iterable


class BlockPool:
    """``num_blocks`` blocks of ``block_tokens`` positions each.

    ``on_evict(block_id)`` is called when an idle block is allocated anew: its content is lost.
    """

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        if num_blocks < 1 or block_tokens < 1:
            raise ValueError(
                f"num_blocks={num_blocks} and block_tokens={block_tokens} must be at least 1"
            )
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.on_evict: Callable[[int], None] | None = None
        self._free = list(range(num_blocks - 1, -1, -1))
        self._refs = [0] * num_blocks
        self._kept: set[int] = set()
        self._idle: dict[int, None] = {}

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated now: free and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Blocks held by at least one sequence."""
        return self.num_blocks - self.num_available

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold ``num_tokens`` positions."""
        return -(-num_tokens // self.block_tokens)

    def available_beside(self, shared: Iterable[int]) -> int:
        """Blocks that could still be allocated once ``shared`` are held."""
        return self.num_available - sum(not self._refs[block_id] for block_id in shared)

    def allocate(self, count: int) -> tuple[int, ...]:
        """Take ``count`` blocks of unspecified content; ask ``num_available`` before."""
        assert count <= self.num_available, "allocate without asking"
        taken = []
        for _ in range(count):
            if self._free:
                block_id = self._free.pop()
            else:
                block_id = next(iter(self._idle))
                del self._idle[block_id]
                self._kept.remove(block_id)
                if self.on_evict is not None:
                    self.on_evict(block_id)
            self._refs[block_id] = 1
            taken.append(block_id)
        return tuple(taken)

    def share(self, block_id: int) -> None:
        """Hold a block that is idle or that others hold too."""
        if not self._refs[block_id]:
            del self._idle[block_id]
        self._refs[block_id] += 1

    def release(self, block_ids: tuple[int, ...]) -> None:
        """Let go of a sequence's blocks, given in sequence order.

        The last is let go first, so that the end of a prefix is reused before its beginning.
        """
        for block_id in reversed(block_ids):
            assert self._refs[block_id] > 0, f"block {block_id} released more often than held"
            self._refs[block_id] -= 1
            if not self._refs[block_id]:
                if block_id in self._kept:
                    self._idle[block_id] = None
                else:
                    self._free.append(block_id)

    def keep(self, block_id: int) -> None:
        """Make a held block idle, not free, when its last holder lets go."""
        assert self._refs[block_id] > 0
        self._kept.add(block_id)

    def check(self, held: Iterable[int] = ()) -> None:
        """Assert every invariant; ``held`` lists each holder's blocks, with repetition."""
        refs = [0] * self.num_blocks
        for block_id in held:
            refs[block_id] += 1
        assert refs == self._refs, "a block is leaked or freed early"
        unused = {block_id for block_id, count in enumerate(self._refs) if not count}
        assert len(self._free) == len(set(self._free))
        assert not set(self._free) & set(self._idle)
        assert set(self._free) | set(self._idle) == unused
        assert set(self._idle) == self._kept & unused
