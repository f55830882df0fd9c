"""Decides what each step computes: continuous batching, chunked prefill, admission, preemption.

Whose turn it is among tenants, ``fairness.py`` says.

Pure: no clock (``tick`` is told the time), no randomness, no I/O, no tensors. ``plan`` reserves
what a step needs and freezes it in a ``StepPlan``; ``commit`` (or ``fail``) tells the scheduler
what came of it. One step may be planned while another is under way: the tokens that it needs and
nobody knows yet are ``UNKNOWN_TOKEN`` in it. Nothing a step computes is trusted, cached or handed
on before its commit, and nothing that a step reads or writes is given back while the step is under
way.
"""

from collections import Counter, deque
from copy import copy
from dataclasses import dataclass
from operator import attrgetter

from shoal.adapters.slots import SlotTable
from shoal.adapters.spec import RowAdapter
from shoal.server.engine.blocks import BlockPool
from shoal.server.engine.deadlines import Deadlines
from shoal.server.engine.fairness import INPUT_PRICE, OUTPUT_PRICE, Backlog, FairQueue
from shoal.server.engine.lookahead import LookAhead
from shoal.server.engine.plan import AdapterLoad, Row, StepPlan, StepResult
from shoal.server.engine.prefix_cache import PrefixCache
from shoal.server.engine.request import FinishReason, Request, TokenEvent
from shoal.server.engine.sequence import Sequence
from shoal.server.engine.stats import EngineStats
from shoal.server.errors import (
    DeadlineExceeded,
    EngineFailure,
    InvalidRequest,
    PromptTooLong,
    ShoalError,
    UnusableAdapter,
)

# Later requests that may start before one whose adapter finds no room. When they are used up,
# nobody behind it starts, so pins drain until it can.
PASSES_MAX = 32
# How far down the queue one step looks for requests that can start; bounds planning time. Tenants
# that wait share it, so that nobody's adapters without room hide the others.
SCAN_MAX = 1024
# Blocks left alone when a request starts beside others: without them it would soon be
# preempted by their growth, and its prompt computed twice.
RESERVE = 0.01
# Recorded steps that a burst of short prompts is spread over at most. What is more is a queue: with
# short outputs most lanes would stay empty if only so few of it started in each step.
SPREAD_MAX = 4
# Plans that may be under way at once: one that runs, and one that waits for it.
FLIGHTS_MAX = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """What a step and the engine may hold.

    Attributes:
        block_tokens, num_blocks: the KV pool.
        max_num_seqs: rows in a step, hence running requests.
        max_num_batched_tokens: tokens in a step; at least ``max_num_seqs``, so that every
            running request advances in every step.
        max_model_len: prompt and output tokens of one request.
        max_waiting: accepted requests that are not running (checked by ``EngineLoop``).
        max_waiting_per_tenant: those of one tenant; None is ``max_waiting``.
        max_wait_s: a request that would wait longer by our estimate is refused; None is never.
        vocab_size: token ids must be below it; None does not check.
        recorded_prompts: prompts, and their tokens, of the largest step that the runner replays
            rather than launches. While others decode, a burst of short prompts is spread over a few
            such steps: one step of them all would take several times as long. None: there are none.
    """

    block_tokens: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_waiting: int
    max_waiting_per_tenant: int | None = None
    max_wait_s: float | None = None
    vocab_size: int | None = None
    recorded_prompts: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("block_tokens", "num_blocks", "max_num_seqs", "max_waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
                f"max_num_seqs={self.max_num_seqs}"
            )
        if self.max_waiting_per_tenant is not None and self.max_waiting_per_tenant < 1:
            raise ValueError(
                f"max_waiting_per_tenant={self.max_waiting_per_tenant} must be at least 1"
            )
        if self.max_wait_s is not None and not self.max_wait_s > 0:
            raise ValueError(f"max_wait_s={self.max_wait_s} must be above 0")
        if self.max_model_len < 2:
            raise ValueError(f"max_model_len={self.max_model_len} must be at least 2")


@dataclass(slots=True)
class _Prompts:
    """Those of a step: how many, their tokens, and the rows of one token beside them."""

    count: int
    tokens: int
    beside: int

    def add(self, tokens: int) -> None:
        if tokens == 1:
            self.beside += 1
        else:
            self.count += 1
            self.tokens += tokens

    def fill(self, recorded: tuple[int, int] | None) -> bool:
        """Whether the step has a recording, and would have none with one more prompt, while
        somebody else waits for it. See ``SchedulerLimits.recorded_prompts``."""
        if recorded is None or not self.beside:
            return False
        return self.count == recorded[0] and self.tokens <= recorded[1]


class Scheduler:
    """Owns every live request from ``add`` to its last event. Not thread-safe."""

    def __init__(
        self, limits: SchedulerLimits, slots: SlotTable, eos_token_ids: frozenset[int]
    ) -> None:
        self.limits = limits
        self._slots = slots
        self._ahead = LookAhead(slots)
        self._eos = eos_token_ids
        self._blocks = BlockPool(limits.num_blocks, limits.block_tokens)
        self._cache = PrefixCache(self._blocks)
        self._reserve = int(limits.num_blocks * RESERVE)
        # The last token of a request is never an input, so it needs no place in the pool.
        self._tokens_max = min(limits.max_model_len, limits.num_blocks * limits.block_tokens + 1)
        self._live: dict[str, Sequence] = {}
        self._waiting: FairQueue[Sequence] = FairQueue()
        self._deadlines = Deadlines()
        self._now_s = 0.0
        self._running: dict[str, Sequence] = {}
        self._flights: deque[_Flight] = deque()  # plans under way, the oldest first
        # Pinned adapters whose load failed: loaded again when asked for, evicted when let go.
        self._lost: set[str] = set()
        self._lanes = list(range(limits.max_num_seqs - 1, -1, -1))  # those that nobody holds
        self._next_order = 0
        self._queries = self._hits = self._preemptions = 0
        self._prompt_tokens = self._generation_tokens = self._steps = 0

    @property
    def has_work(self) -> bool:
        """Whether a request has not ended."""
        return bool(self._live)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, request: Request) -> TokenEvent | None:
        """Accept a request; returns its only event when it can never run."""
        assert request.id not in self._live, f"request id {request.id} is in use"
        error = self._refusal(request)
        if error is not None:
            return TokenEvent(request_id=request.id, error=error)
        seq = Sequence(
            request,
            self._waiting.open(request.tenant, request.weight),
            self._next_order,
            self.limits.block_tokens,
            self._tokens_max,
            self._eos,
        )
        self._next_order += 1
        self._live[request.id] = seq
        self._waiting.put(seq)
        if request.deadline_s is not None:
            self._deadlines.add(request.deadline_s, seq)
        return None

    def abort(self, request_id: str) -> TokenEvent | None:
        """End a request now, whatever it is doing; None when it has ended already."""
        seq = self._live.get(request_id)
        if seq is None:
            return None
        self._end(seq)
        return TokenEvent(request_id=request_id, finish_reason=FinishReason.ABORT)

    def tick(self, now_s: float) -> list[TokenEvent]:
        """Say what time it is, on the clock of the requests' times; ends those that are too late.

        A request without output gets ``DeadlineExceeded``, another one ends with what it has. A
        clock that goes back ends nobody.
        """
        self._now_s = now_s
        events = []
        for seq in self._deadlines.passed(now_s):
            self._end(seq)
            if seq.output_tokens:
                event = TokenEvent(seq.request.id, finish_reason=FinishReason.DEADLINE)
            else:
                event = TokenEvent(seq.request.id, error=_too_late(seq.request))
            events.append(event)
        return events

    def plan(self) -> StepPlan | None:
        """Reserve and describe the next step.

        Every plan must be given to ``commit`` or ``fail``, the oldest first; one may be under
        way when the next is asked for.

        Returns:
            None when there is nothing to do before the plan under way has landed or, when there
            is none, before a request comes.
        """
        assert len(self._flights) < FLIGHTS_MAX, "too many plans are under way"
        shares: dict[Sequence, int] = {}
        preemptions = self._preemptions
        if not self._share_decodes(shares):
            return None
        if len(shares) < len(self._running):
            self._share_prompts(shares)
        loads: list[AdapterLoad] = []
        # Blocks just taken from a running request are not for newcomers.
        if self._waiting and self._preemptions == preemptions:
            loads = self._admit(shares)
        if not self._waiting:
            self._ahead.let_go_all()
        if not shares:
            assert self._flights or not self._live, "requests wait but nothing can run"
            return None
        # From here on nothing can go wrong: what is shared out is under way.
        seqs = sorted([seq for seq, count in shares.items() if count == 1], key=_PLACE)
        if len(seqs) < len(shares):
            seqs += sorted([seq for seq, count in shares.items() if count > 1], key=_PLACE)
        prefetches = self._ahead.look(self._waiting, self._lost) if self._waiting else []
        plan = StepPlan(
            rows=tuple([seq.schedule(shares[seq]) for seq in seqs]),
            adapter_loads=tuple(loads),
            prefetches=tuple(prefetches),
        )
        self._flights.append(_Flight(plan, seqs))
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[TokenEvent]:
        """Take a step's tokens in; returns what happened to each request that is still there."""
        events = []
        for row, seq in zip(plan.rows, self._land(plan), strict=True):
            if seq.ended:
                continue
            event = self._advance(seq, row, result)
            if event is not None:
                events.append(event)
        return events

    def fail(self, plan: StepPlan, error: ShoalError) -> list[TokenEvent]:
        """End every request of a step that did not happen; the others are unharmed.

        A request that relies on an adapter which this step was to load ends too, even when it
        has rows in the younger step only.
        """
        doomed = self._land(plan)
        loads = (*plan.adapter_loads, *plan.prefetches)
        lost = {load.adapter.spec.digest for load in loads}
        if lost:
            doomed += [
                seq
                for seq in self._running.values()
                if seq.row_adapter is not None and seq.row_adapter.spec.digest in lost
            ]
        events = []
        for seq in doomed:
            if not seq.ended:
                self._end(seq)
                # Copies, because each consumer raises its own and grows its traceback.
                events.append(TokenEvent(request_id=seq.request.id, error=copy(error)))
        for digest in lost:
            self._ahead.let_go(digest)
            if not self._slots.evict(digest) and self._slots.resident(digest):
                assert self._flights, "a failed load is still pinned"
                self._lost.add(digest)
        return events

    @property
    def service_total(self) -> int:
        """What all tenants were charged since the start, in units of price."""
        return self._waiting.service

    def backlog(self) -> list[Backlog]:
        """Tenants whose part of the queue changed since the last call; to be called each step."""
        return self._waiting.changes()

    def stats(self) -> EngineStats:
        """Counters and gauges; ``last_step_s`` is the loop's to fill."""
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            kv_blocks_used=self._blocks.num_used,
            kv_blocks_total=self._blocks.num_blocks,
            adapters_resident=self._slots.num_resident,
            prefix_cache_queries=self._queries,
            prefix_cache_hits=self._hits,
            preemptions_total=self._preemptions,
            prompt_tokens_total=self._prompt_tokens,
            generation_tokens_total=self._generation_tokens,
            steps_total=self._steps,
        )

    def check(self) -> None:
        """Assert every invariant; for tests."""
        under_way = Counter(seq for flight in self._flights for seq in flight.seqs)
        holders = [*self._running.values(), *(seq for seq in under_way if seq.ended)]
        self._blocks.check(block_id for seq in holders for block_id in seq.block_ids)
        lanes = [seq.lane for seq in holders] + self._lanes
        assert sorted(lanes) == list(range(self.limits.max_num_seqs)), "a lane is lost or shared"
        self._cache.check()
        self._slots.check()
        pinned = {s.row_adapter.spec.digest for s in holders if s.row_adapter is not None}
        assert not self._ahead.held or self._waiting, "held for nobody"
        assert not self._ahead.held & self._lost
        pinned |= self._ahead.held
        assert self._slots.num_pinned == len(pinned), "a slot is pinned by nobody"
        assert all(self._slots.resident(digest) for digest in pinned)
        assert self._lost <= pinned, "a failed load is trusted again"
        self._waiting.check()
        queued = [seq for seq in self._live.values() if seq.request.id not in self._running]
        assert set(self._waiting) == set(queued)
        waiting = {seq.request.id: seq for seq in queued}
        assert not waiting.keys() & self._running.keys()
        assert waiting | self._running == self._live
        assert len(self._running) <= self.limits.max_num_seqs
        for seq in queued:
            assert not seq.block_ids
            assert seq.lane == -1
            assert seq.row_adapter is None
            assert not under_way[seq]
            assert seq.scheduled == 0
        for seq in self._running.values():
            assert (seq.row_adapter is None) == (seq.request.adapter is None)
            assert 0 <= seq.computed <= seq.scheduled < seq.length <= self._tokens_max
            assert seq.computed < len(seq.tokens) < self._tokens_max
            assert seq.scheduled <= len(seq.block_ids) * self.limits.block_tokens
            assert 0 <= seq.length - len(seq.tokens) <= under_way[seq]
            assert under_way[seq] or seq.scheduled == seq.computed
        for seq in self._live.values():
            assert seq.in_flight == under_way[seq]

    # -- refusing ---------------------------------------------------------------------------

    def _refusal(self, request: Request) -> ShoalError | None:
        length = len(request.prompt_ids)
        if not length:
            return InvalidRequest("the prompt has 0 tokens; at least 1 is needed", param="prompt")
        if length >= self._tokens_max:
            return PromptTooLong(
                f"the prompt has {length} tokens; this server takes at most "
                f"{self._tokens_max - 1}, which leaves room for one token of output",
                param="prompt",
            )
        vocab = self.limits.vocab_size
        if (
            vocab is not None
            and not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < vocab
        ):
            wrong = next(token for token in request.prompt_ids if not 0 <= token < vocab)
            return InvalidRequest(
                f"token id {wrong} is not in the vocabulary of {vocab} tokens", param="prompt"
            )
        if request.adapter is not None and not self._slots.fits(request.adapter):
            room = self._slots.num_units * self._slots.unit_elements
            return UnusableAdapter(
                f"the adapter takes {request.adapter.packed_elements} elements; the adapter "
                f"bank of this server holds {room}",
                param="model",
            )
        return None

    # -- planning ---------------------------------------------------------------------------

    def _share_decodes(self, shares: dict[Sequence, int]) -> bool:
        """One token for each running request that has one pending, and a place to write it.

        Returns:
            False when a request must give way first and cannot, because a step is under way.
        """
        for seq in list(self._running.values()):
            if seq.pending != 1 or seq.lane < 0 or seq.must_land:
                continue
            while not self._cover(seq):
                if self._flights:
                    return False
                victim = max(self._running.values(), key=attrgetter("order"))
                shares.pop(victim, None)
                self._preempt(victim)
                if victim is seq:
                    break
            else:
                shares[seq] = 1
        return True

    def _share_prompts(self, shares: dict[Sequence, int]) -> None:
        """What is left of the step's tokens goes to prompts under way; they have their blocks."""
        budget = self.limits.max_num_batched_tokens - len(shares)
        for seq in self._running.values():
            if seq.pending > 1 and budget:
                shares[seq] = min(seq.pending, budget)
                budget -= shares[seq]

    def _admit(self, shares: dict[Sequence, int]) -> list[AdapterLoad]:
        """Start waiting requests, in their queue's order, while the step has room.

        A request whose adapter finds no room among the pinned ones is passed over, at most
        ``PASSES_MAX`` times. One that finds no blocks holds up all behind it, since any of
        them would take what it waits for. Behind a full set of short prompts all wait for the
        next step (``SchedulerLimits.recorded_prompts``), unless they are too many.
        """
        budget = self.limits.max_num_batched_tokens - sum(shares.values())
        loads: list[AdapterLoad] = []
        passed: list[Sequence] = []
        # Pins only grow while planning: what found no room once will find none later in this
        # plan, nor will anything larger.
        denied = self._slots.num_units * self._slots.unit_elements + 1
        looked = max(1, SCAN_MAX // self._waiting.num_tenants)
        recorded = self.limits.recorded_prompts
        if recorded is not None and len(self._waiting) > SPREAD_MAX * recorded[0]:
            recorded = None
        under_way = [tokens for tokens in shares.values() if tokens > 1]
        prompts = _Prompts(len(under_way), sum(under_way), beside=len(shares) - len(under_way))
        while budget and self._lanes and len(passed) < SCAN_MAX:
            seq = self._waiting.peek()
            if seq is None or prompts.fill(recorded):
                break
            denies = self._is_denied(seq, denied)
            hits = () if denies else self._can_start(seq)
            if hits is None:
                break
            if denies or not self._take_slot(seq, loads):
                assert seq.request.adapter is not None
                denied = min(denied, seq.request.adapter.packed_elements)
                if seq.passes >= PASSES_MAX:
                    break
                passed.append(seq)
                self._waiting.skip(looked)
                continue
            self._waiting.take()
            for other in passed:
                other.passes += 1
            self._start(seq, hits)
            shares[seq] = min(seq.pending, budget)
            budget -= shares[seq]
            prompts.add(shares[seq])
        self._waiting.rewind()
        return loads

    def _is_denied(self, seq: Sequence, denied: int) -> bool:
        adapter = seq.request.adapter
        return (
            adapter is not None
            and adapter.packed_elements >= denied
            and not self._slots.resident(adapter.digest)
        )

    def _can_start(self, seq: Sequence) -> tuple[int, ...] | None:
        """Cached blocks it would begin with, or None when there are too few for the rest.

        All blocks of a prompt are asked for at once, so prompts under way never preempt.
        """
        # At least one token is computed, because only computing yields logits.
        reusable = (len(seq.tokens) - 1) // self.limits.block_tokens
        hits = self._cache.match(seq.chain, reusable)
        fresh = self._blocks.blocks_for(len(seq.tokens)) - len(hits)
        spare = self._blocks.available_beside(hits) - fresh
        return hits if spare >= (self._reserve if self._running else 0) else None

    def _take_slot(self, seq: Sequence, loads: list[AdapterLoad]) -> bool:
        adapter = seq.request.adapter
        if adapter is None:
            return True
        acquired = self._slots.acquire(adapter)
        while acquired is None and self._ahead.make_room():
            acquired = self._slots.acquire(adapter)
        if acquired is None:
            return False
        slot, needs_load = acquired
        held = RowAdapter(adapter, slot)
        seq.hold(held)
        if needs_load or adapter.digest in self._lost:
            self._lost.discard(adapter.digest)
            loads.append(AdapterLoad(adapter=held))
        return True

    def _start(self, seq: Sequence, hits: tuple[int, ...]) -> None:
        for block_id in hits:
            self._blocks.share(block_id)
        fresh = self._blocks.blocks_for(len(seq.tokens)) - len(hits)
        seq.block_ids = hits + self._blocks.allocate(fresh)
        seq.computed = seq.scheduled = len(hits) * self.limits.block_tokens
        seq.committed_blocks = len(hits)
        seq.passes = 0
        seq.lane = self._lanes.pop()
        if seq.cached_tokens is None:  # not counted again when it returns from preemption
            seq.cached_tokens = seq.computed
            seq.started_s = self._now_s
            self._queries += len(seq.tokens)
            self._hits += seq.computed
            self._waiting.charge(seq.account, INPUT_PRICE * (len(seq.tokens) - seq.computed))
        self._running[seq.request.id] = seq

    def _cover(self, seq: Sequence) -> bool:
        """Give ``seq`` the block its next token needs, if it needs one; False if none is left."""
        if seq.length > len(seq.block_ids) * self.limits.block_tokens:
            if not self._blocks.num_available:
                return False
            seq.block_ids += self._blocks.allocate(1)
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Back to the queue with all its tokens; its KV is computed again later."""
        assert not self._flights
        del self._running[seq.request.id]
        self._release(seq)
        seq.computed = seq.scheduled = 0
        self._waiting.put(seq)
        self._preemptions += 1

    # -- taking results in ------------------------------------------------------------------

    def _land(self, plan: StepPlan) -> list[Sequence]:
        """The oldest step is over: what requests that ended meanwhile still held can go now.

        Returns:
            The sequences of its rows, in their order.
        """
        flight = self._flights.popleft()
        assert flight.plan is plan, "plans land in the order they were made"
        self._steps += 1
        for seq in flight.seqs:
            seq.in_flight -= 1
            if seq.ended and not seq.in_flight:
                self._release(seq)
        return flight.seqs

    def _advance(self, seq: Sequence, row: Row, result: StepResult) -> TokenEvent | None:
        request_id = row.request_id
        token = result.token_ids.get(request_id)
        if request_id in result.failed or (token is None and row.sample):
            why = result.failed.get(request_id, "the runner sampled no token for it")
            self._end(seq)
            return TokenEvent(
                request_id=request_id, error=EngineFailure(f"the request failed: {why}")
            )
        seq.computed = row.start + len(row.token_ids)
        if seq.computed // self.limits.block_tokens > seq.committed_blocks:
            self._offer_blocks(seq)
        if token is None or not row.sample:
            return None
        seq.tokens.append(token)
        self._waiting.charge(seq.account, OUTPUT_PRICE)
        self._generation_tokens += 1
        first = not row.output_tokens
        if first:
            self._prompt_tokens += len(seq.request.prompt_ids)
        reason = seq.finish_reason()
        if reason is not None:
            seq.account.note_output(seq.output_tokens)
            self._end(seq)
        logprobs = result.logprobs.get(request_id)
        return TokenEvent(
            request_id=request_id,
            token_ids=(token,),
            logprobs=() if logprobs is None else (logprobs,),
            finish_reason=reason,
            cached_tokens=(seq.cached_tokens or 0) if first else 0,
            queue_s=max(0.0, seq.started_s - seq.request.arrival_s) if first else 0.0,
        )

    def _offer_blocks(self, seq: Sequence) -> None:
        """Blocks that are computed to their end can serve other requests."""
        full = seq.computed // self.limits.block_tokens
        for index in range(seq.committed_blocks, full):
            self._cache.commit(seq.chain.key(index), seq.block_ids[index])
        seq.committed_blocks = full

    def _end(self, seq: Sequence) -> None:
        """Forget a request; what steps under way use is given back when the last has landed."""
        request_id = seq.request.id
        del self._live[request_id]
        if self._running.pop(request_id, None) is None:
            self._waiting.remove(seq)
            if not self._waiting:
                self._ahead.let_go_all()
        self._waiting.close(seq.account)
        seq.ended = True
        if seq.request.deadline_s is not None:
            self._deadlines.forget()
        if not seq.in_flight:
            self._release(seq)

    def _release(self, seq: Sequence) -> None:
        self._blocks.release(seq.block_ids)
        seq.block_ids = ()
        seq.committed_blocks = 0
        if seq.row_adapter is not None:
            digest = seq.row_adapter.spec.digest
            seq.row_adapter = None
            self._slots.release(digest)
            if digest in self._lost and self._slots.evict(digest):
                self._lost.remove(digest)
        if seq.lane >= 0:
            self._lanes.append(seq.lane)
            seq.lane = -1


@dataclass(frozen=True, slots=True)
class _Flight:
    """A plan under way, and the sequences of its rows."""

    plan: StepPlan
    seqs: list[Sequence]


_PLACE = attrgetter("place")


def _too_late(request: Request) -> DeadlineExceeded:
    assert request.deadline_s is not None
    given_ms = (request.deadline_s - request.arrival_s) * 1000
    return DeadlineExceeded(
        f"the request's deadline of {given_ms:.0f} ms passed before it had made a token",
        param="deadline_ms",
    )
