"""A runner without a model: deterministic tokens that show every bookkeeping mistake.

Pure. It keeps a KV memory addressed like the real one (block id, position in block). What it
writes for a position depends on all it reads for the positions before, as attention does, and
the next token depends on all of them and on the adapter. So a block that is stale, or shared
with the wrong prefix or adapter, changes the tokens, and ``FakeRunner.expected`` says what they
should have been. It also knows which adapter was loaded where, and which token each lane sampled
in the step before: a row that would read another adapter, an unwritten position or an unknown
token that nobody sampled fails, and says why.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from shoal.adapters.spec import RowAdapter, Slot
from shoal.server.engine.plan import UNKNOWN_TOKEN, Done, Pending, Row, StepPlan, StepResult
from shoal.server.engine.request import TokenLogprobs

_MASK = (1 << 64) - 1


class FakeRunner:
    """Executes plans on integers.

    Args:
        vocab_size: sampled tokens are below it. Large ones make wrong states easier to see.
        block_tokens: positions in a KV block, as in ``SchedulerLimits``.
        lookahead: steps run when they are waited for, so that the next plan can be given before.
        before_step: called with each plan before anything happens; may block, or raise to play
            a device that failed.
    """

    def __init__(
        self,
        vocab_size: int,
        block_tokens: int = 16,
        *,
        lookahead: bool = False,
        before_step: Callable[[StepPlan], None] | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.block_tokens = block_tokens
        self.lookahead = lookahead
        self.before_step = before_step
        self.steps = 0
        self._under_way: deque[StepPlan] = deque()
        self._sampled: dict[int, int] = {}  # lane -> token, of the step before
        self._cells: dict[tuple[int, int], int] = {}  # (block id, position in block) -> value
        self._bank: dict[str, Slot] = {}  # digest -> where it lies; extents never overlap

    def expected(
        self,
        prompt_ids: Sequence[int],
        adapter_digest: str | None,
        count: int,
        *,
        suppressed_ids: Iterable[int] = (),
        min_tokens: int = 0,
    ) -> list[int]:
        """The first ``count`` tokens of a request served alone, ends of sequence ignored.

        ``suppressed_ids`` are not chosen as any of the first ``min_tokens`` tokens.
        """
        seed = _seed(adapter_digest)
        suppressed = frozenset(suppressed_ids)
        state = seed
        for token in prompt_ids:
            state = _mix(state, _cell(state, token, seed))
        output: list[int] = []
        for index in range(count):
            token = self._choose(state, seed, suppressed if index < min_tokens else frozenset())
            output.append(token)
            state = _mix(state, _cell(state, token, seed))
        return output

    def submit(self, plan: StepPlan) -> Pending:
        """Begin a step. See ``Runner``."""
        if not self.lookahead:
            return Done(self._run(plan))
        self._under_way.append(plan)
        return _Later(self, plan)

    def land(self, plan: StepPlan) -> StepResult:
        """Run a step that was submitted; the oldest one goes first."""
        assert self._under_way.popleft() is plan, "steps must be waited for in their order"
        return self._run(plan)

    def _run(self, plan: StepPlan) -> StepResult:
        before, self._sampled = self._sampled if self.lookahead else {}, {}
        if self.before_step is not None:
            self.before_step(plan)
        self.steps += 1
        for load in (*plan.adapter_loads, *plan.prefetches):
            self._load(load.adapter)
        result = StepResult(token_ids={})
        for row in plan.rows:
            try:
                state = self._forward(row, before)
            except _BadRow as why:
                result.failed[row.request_id] = str(why)
                continue
            if not row.sample:
                continue
            digest = row.adapter.spec.digest if row.adapter else None
            token = self._choose(state, _seed(digest), frozenset(row.suppressed_ids))
            self._sampled[row.lane] = token
            result.token_ids[row.request_id] = token
            if row.sampling.logprobs is not None:
                alternatives = range(row.sampling.logprobs)
                result.logprobs[row.request_id] = TokenLogprobs(
                    -1.0, tuple(((token + i) % self.vocab_size, -1.0 - i) for i in alternatives)
                )
        return result

    def _load(self, adapter: RowAdapter) -> None:
        slot = adapter.slot
        for digest, other in list(self._bank.items()):
            if other.unit < slot.unit + slot.num_units and slot.unit < other.unit + other.num_units:
                del self._bank[digest]
        self._bank[adapter.spec.digest] = slot

    def _forward(self, row: Row, before: dict[int, int]) -> int:
        """Write the row's KV; the state after its last token."""
        digest = None
        if row.adapter is not None:
            digest = row.adapter.spec.digest
            if self._bank.get(digest) != row.adapter.slot:
                raise _BadRow(f"{row.adapter.slot} does not hold adapter {digest}")
        token_ids = row.token_ids
        if token_ids == (UNKNOWN_TOKEN,):
            if row.lane not in before:
                raise _BadRow(f"lane {row.lane} sampled nothing in the step before")
            token_ids = (before[row.lane],)
        end = row.start + len(token_ids)
        if len(row.block_ids) != -(-end // self.block_tokens):
            raise _BadRow(f"{len(row.block_ids)} blocks do not cover {end} positions")
        seed = state = _seed(digest)
        for position in range(row.start):
            cell = self._cells.get(self._place(row, position))
            if cell is None:
                raise _BadRow(f"position {position} of {row.request_id} was never written")
            state = _mix(state, cell)
        for position, token in enumerate(token_ids, row.start):
            cell = _cell(state, token, seed)
            self._cells[self._place(row, position)] = cell
            state = _mix(state, cell)
        return state

    def _place(self, row: Row, position: int) -> tuple[int, int]:
        return row.block_ids[position // self.block_tokens], position % self.block_tokens

    def _choose(self, state: int, seed: int, suppressed: frozenset[int]) -> int:
        state = _mix(state, seed)
        while (token := state % self.vocab_size) in suppressed:
            state = _mix(state, token)
        return token


@dataclass(frozen=True, slots=True)
class _Later:
    """A step that runs when it is waited for."""

    runner: FakeRunner
    plan: StepPlan

    def wait(self) -> StepResult:
        return self.runner.land(self.plan)


class _BadRow(Exception):
    """A row that reads what nobody wrote."""


def _seed(adapter_digest: str | None) -> int:
    """How an adapter (None: the base) enters every value; stable over processes."""
    name = "" if adapter_digest is None else f"adapter {adapter_digest}"
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest())


def _cell(state: int, token: int, seed: int) -> int:
    return _mix(_mix(state, token), seed)


def _mix(state: int, value: int) -> int:
    state = ((state ^ value) * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & _MASK
    return state ^ (state >> 29)
