"""Which steps are replayed from a CUDA graph, and which of those are captured when.

``GraphSizes`` rounds a step up to a size that has a graph; ``Graphs`` keeps what is captured and
says what is to be captured next. Neither touches the device: ``DeviceRunner`` captures and replays.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

from shoal.adapters.tables import ActiveFamilies
from shoal.server.model.step_tensors import Layout

# Steps whose prompt chunks are few and short have graphs too: what is left of the time such a step
# takes is otherwise the CPU's, for its 300 launches. (Longer ones keep the device busy meanwhile.)
CHUNKS = 16
# Few sizes, so that all of them can be recorded before they are needed (``Graphs.plan``): what an
# unused place costs is little beside reading the weights.
CHUNK_TOKENS = (16, 64, 256, 1024)
CHUNK_ROWS = 64
# Which mixes of families and ranks are asked for is up to the clients; each takes memory for good.
# Mixes that come later run their kernels one by one.
GRAPHS_MAX = 1024
# Recording a graph stops everybody for 0.2 s and more, running its kernels one by one only for as
# long as their launches take: while others wait, only what comes again and again is recorded.
RECORD_AFTER = 8
NO_FAMILIES = ActiveFamilies()

Captured = TypeVar("Captured")


class GraphKey(NamedTuple):
    """What a captured step depends on; everything else is in static tensors.

    Attributes:
        layout: places for rows and tokens.
        short: whether no row sees more than ``device_runner.SHORT_CONTEXT`` positions.
        greedy: whether every row takes the most probable token.
        active: families that some row's adapter is of.
    """

    layout: Layout
    short: bool
    greedy: bool
    active: ActiveFamilies


def row_buckets(most: int) -> tuple[int, ...]:
    """Row counts that have graphs: powers of two to 16, then steps that waste under a quarter."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256]
    sizes += range(320, most + 64, 64)
    return (*(size for size in sizes if size < most), most)


def ends(sizes: Sequence[int]) -> tuple[int, int]:
    """The smallest and the largest of ascending sizes: they launch between them what the others
    launch, where kernels do not look at the sizes of more than their tiles."""
    return sizes[0], sizes[-1]


class GraphSizes:
    """The sizes of steps that have graphs.

    Args:
        most: rows of a step.
        shorts: the values that ``GraphKey.short`` takes.

    Attributes:
        buckets: rows of steps that only decode, ascending.
        chunk_buckets: decode rows of steps with prompts. Fewer: what an unused row costs is
            little there.
    """

    def __init__(self, most: int, shorts: Sequence[bool]) -> None:
        self.buckets = row_buckets(most)
        self.chunk_buckets = (0, *(b for b in self.buckets if b % CHUNK_ROWS == 0 or b == most))
        self._shorts = tuple(shorts)

    @property
    def prompts(self) -> tuple[int, int]:
        """The most prompts, and tokens of prompts, that a step with a graph has."""
        return CHUNKS, CHUNK_TOKENS[-1]

    @property
    def largest(self) -> Layout:
        """With at least the rows and tokens of every layout."""
        most = self.buckets[-1]
        return Layout(0, most + CHUNKS, most + CHUNK_TOKENS[-1])

    def layout(self, used: Layout, *, all_sample: bool) -> Layout | None:
        """The smallest that has room for ``used``; None when none has.

        Where ``all_sample`` is false, some rows give no token: as only steps with prompts allow.
        """
        if not used.chunks and all_sample:
            return Layout(next(size for size in self.buckets if size >= used.decode_rows))
        if used.chunks > CHUNKS or used.chunk_tokens > CHUNK_TOKENS[-1]:
            return None
        return Layout(
            next(size for size in self.chunk_buckets if size >= used.decode_rows),
            CHUNKS,
            next(size for size in CHUNK_TOKENS if size >= used.chunk_tokens),
        )

    def decode_keys(
        self, families: Sequence[ActiveFamilies], buckets: Sequence[int] | None = None
    ) -> list[GraphKey]:
        """Of steps that only decode, in these of ``buckets`` or all."""
        return [
            GraphKey(Layout(rows), short, greedy, active)
            for active in families
            for greedy in (True, False)
            for short in self._shorts
            # The largest first: the others fit in its memory.
            for rows in reversed(self.buckets if buckets is None else buckets)
        ]

    def prompt_keys(
        self,
        families: Sequence[ActiveFamilies],
        tokens: Sequence[int] | None = None,
        buckets: Sequence[int] | None = None,
    ) -> list[GraphKey]:
        """Of steps with prompts: in these of ``CHUNK_TOKENS`` and ``chunk_buckets``, or all."""
        return [
            GraphKey(Layout(rows, CHUNKS, count), short, False, active)
            for count in (CHUNK_TOKENS if tokens is None else tokens)
            for short in self._shorts
            for active in families
            for rows in (self.chunk_buckets if buckets is None else buckets)
        ]


class Graphs(Generic[Captured]):
    """The graphs that there are, and what is to be captured next.

    Args:
        enabled: whether there are to be any.
        is_full: whether there is no memory for another one that no step waits for.

    Attributes:
        enabled: whether any is asked for; not after ``stop``.
        record_after: how often steps must have wanted a graph before one of them stops for it.
    """

    def __init__(self, *, enabled: bool, is_full: Callable[[], bool]) -> None:
        self.record_after = 1
        self.enabled = enabled
        self._is_full = is_full
        self._captured: dict[GraphKey, Captured] = {}
        self._planned: deque[GraphKey] = deque()
        self._wanted: Counter[GraphKey] = Counter()

    def __len__(self) -> int:
        return len(self._captured)

    def __contains__(self, key: GraphKey) -> bool:
        return key in self._captured

    @property
    def planned(self) -> Sequence[GraphKey]:
        """What idle moments are for, the first first."""
        return tuple(self._planned)

    @property
    def num_wanted(self) -> int:
        """Graphs that steps have wanted, and that there are not."""
        return len(self._wanted)

    def get(self, key: GraphKey) -> Captured | None:
        """A step's graph, if it is captured."""
        return self._captured.get(key)

    def add(self, key: GraphKey, captured: Captured) -> None:
        """Keep what was captured."""
        self._captured[key] = captured

    def stop(self) -> None:
        """Ask for no other, because the attempt failed: each would take its time and fail, too."""
        self.enabled = False

    def plan(self, keys: Iterable[GraphKey]) -> None:
        """Have them captured in idle moments, after what is planned already."""
        self._planned.extend(keys)

    def wants(self, key: GraphKey) -> bool:
        """Count that a step wants the graph, which is not there; whether it is to capture it."""
        if not (self.enabled and key.active.capturable and len(self) < GRAPHS_MAX):
            return False
        if len(self._wanted) >= GRAPHS_MAX and key not in self._wanted:
            self._wanted.clear()
        self._wanted[key] += 1
        if self._wanted[key] < self.record_after:
            return False
        del self._wanted[key]
        return True

    def next(self) -> GraphKey | None:
        """What to capture in an idle moment, removed from what waits; None when nothing is."""
        if not self.enabled or len(self) >= GRAPHS_MAX or self._is_full():
            return None
        while self._planned:
            key = self._planned.popleft()
            if key not in self:
                return key
        # What steps wanted, and was not captured while others waited.
        while self._wanted:
            key, _ = self._wanted.most_common(1)[0]
            del self._wanted[key]
            if key not in self:
                return key
        return None
