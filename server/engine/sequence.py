"""One request's progress inside the scheduler: its tokens, blocks and slot, and when it ends.

Pure. The scheduler decides; this holds what it decided on and turns it into a ``Row``.
"""

from shoal.adapters.spec import RowAdapter
from shoal.server.engine.fairness import Account
from shoal.server.engine.plan import UNKNOWN_TOKEN, Row
from shoal.server.engine.prefix_cache import KeyChain
from shoal.server.engine.request import FinishReason, Request, SamplingParams

_BASE_PLACE = ("", -1)


class Sequence:
    """A live request.

    A plan under way moves ``scheduled`` and ``length`` ahead; its commit lets ``computed`` and
    ``tokens`` follow. While nothing is under way, ``scheduled == computed`` and
    ``length == len(tokens)``.

    Attributes:
        order: when it was accepted; lower is older, and is served first within its tenant.
        account: its tenant's.
        tokens: prompt and output so far, as far as it is known.
        length: ``tokens``, and those that a step under way samples.
        computed: how many of ``tokens`` are in the KV cache.
        scheduled: how many are there once the steps under way are over.
        in_flight: how many plans under way have a row of it.
        block_ids, row_adapter, lane: what it holds; empty, None and -1 while it waits.
        place: where its rows go among those of equal length: the base, then each adapter.
        committed_blocks: how many of its blocks were offered to the prefix cache.
        cached_tokens: prompt tokens found in the prefix cache when it first started, or None.
        started_s: when that was.
        passes: later requests that started while its adapter could not get a slot.
        ended: its last event has been sent.
    """

    __slots__ = (
        "_block_tokens",
        "_length_max",
        "_penalised",
        "_prompt_tokens",
        "_stop_ids",
        "_suppressed_ids",
        "account",
        "block_ids",
        "cached_tokens",
        "chain",
        "committed_blocks",
        "computed",
        "ended",
        "in_flight",
        "lane",
        "length",
        "order",
        "passes",
        "place",
        "request",
        "row_adapter",
        "scheduled",
        "started_s",
        "tokens",
    )

    def __init__(
        self,
        request: Request,
        account: Account,
        order: int,
        block_tokens: int,
        tokens_max: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        """Args:
        tokens_max: bounds prompt and output of any request.
        """
        sampling = request.sampling
        self.request = request
        self.account = account
        self.order = order
        self.tokens = list(request.prompt_ids)
        self.length = self._prompt_tokens = len(self.tokens)
        self.chain = KeyChain(
            request.adapter.digest if request.adapter else "",
            self.tokens,
            block_tokens,
            request.tenant,
        )
        self.computed = self.scheduled = 0
        self.in_flight = 0
        self.block_ids: tuple[int, ...] = ()
        self.row_adapter: RowAdapter | None = None
        self.place = _BASE_PLACE
        self.lane = -1
        self.committed_blocks = 0
        self.cached_tokens: int | None = None
        self.started_s = 0.0
        self.passes = 0
        self.ended = False
        self._block_tokens = block_tokens
        self._length_max = min(self._prompt_tokens + sampling.max_tokens, tokens_max)
        self._penalised = _has_penalties(sampling)
        self._stop_ids = sampling.stop_token_ids
        if not sampling.ignore_eos:
            self._stop_ids = self._stop_ids | eos_token_ids
        self._suppressed_ids = tuple(sorted(self._stop_ids)) if sampling.min_tokens else ()

    @property
    def pending(self) -> int:
        """Tokens no plan computes yet, at least one; the next is sampled after the last."""
        return self.length - self.scheduled

    @property
    def output_tokens(self) -> int:
        """Tokens sampled so far and known."""
        return len(self.tokens) - self._prompt_tokens

    @property
    def input_tokens(self) -> int:
        """Prompt tokens that were not charged yet; while it waits, before it first started."""
        return self._prompt_tokens if self.cached_tokens is None else 0

    @property
    def output_limit(self) -> int:
        """Tokens that may still be sampled; while nothing is under way."""
        return self._length_max - len(self.tokens)

    @property
    def must_land(self) -> bool:
        """Whether a token under way must be known before there can be another row."""
        return self.length > len(self.tokens) and (
            self._penalised or self.length >= self._length_max
        )

    def hold(self, adapter: RowAdapter) -> None:
        """Run with ``adapter`` where it sits now."""
        self.row_adapter = adapter
        self.place = (adapter.spec.family, adapter.slot.unit)

    def schedule(self, count: int) -> Row:
        """The row that computes the next ``count`` pending tokens, which are under way now."""
        start = self.scheduled
        end = self.scheduled = start + count
        self.in_flight += 1
        if count > 1:
            token_ids = tuple(self.tokens[start:end])
        else:
            token_ids = (self.tokens[start] if start < len(self.tokens) else UNKNOWN_TOKEN,)
        block_ids = self.block_ids
        num_blocks = -(-end // self._block_tokens)
        if num_blocks < len(block_ids):
            block_ids = block_ids[:num_blocks]
        sampling = self.request.sampling
        output_tokens = self.length - self._prompt_tokens
        sample = end == self.length
        penalised = early = False
        if sample:
            self.length = end + 1
            penalised = self._penalised
            early = output_tokens < sampling.min_tokens
        return Row(
            request_id=self.request.id,
            token_ids=token_ids,
            start=start,
            block_ids=block_ids,
            sample=sample,
            sampling=sampling,
            history_ids=tuple(self.tokens) if penalised else (),
            prompt_tokens=self._prompt_tokens if penalised else 0,
            output_tokens=output_tokens,
            adapter=self.row_adapter,
            suppressed_ids=self._suppressed_ids if early else (),
            lane=self.lane,
        )

    def finish_reason(self) -> FinishReason | None:
        """Whether the token that became known last ended the request."""
        if (
            self.tokens[-1] in self._stop_ids
            and self.output_tokens > self.request.sampling.min_tokens
        ):
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.tokens) >= self._length_max else None


def _has_penalties(sampling: SamplingParams) -> bool:
    return (
        sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
        or sampling.repetition_penalty != 1.0
    )
