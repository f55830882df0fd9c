"""One request's progress inside the scheduler: its tokens, blocks and slot, and when it ends.

Pure. The scheduler decides; this holds what it decided on and turns it into a ``Row``.
"""

from shoal.adapters.spec import RowAdapter
from shoal.server.engine.plan import Row
from shoal.server.engine.prefix_cache import KeyChain
from shoal.server.engine.request import FinishReason, Request, SamplingParams


class Sequence:
    """A live request.

    Attributes:
        order: when it was accepted; lower is older, and is served first.
        tokens: prompt and output so far.
        computed: how many of ``tokens`` are in the KV cache.
        block_ids, row_adapter, lane: what it holds; empty, None and -1 while it waits.
        committed_blocks: how many of its blocks were offered to the prefix cache.
        cached_tokens: prompt tokens found in the prefix cache when it first started, or None.
        passes: later requests that started while its adapter could not get a slot.
        ended: its last event has been sent.
    """

    __slots__ = (
        "_stop_ids",
        "block_ids",
        "cached_tokens",
        "chain",
        "committed_blocks",
        "computed",
        "ended",
        "lane",
        "order",
        "passes",
        "request",
        "row_adapter",
        "tokens",
    )

    def __init__(
        self, request: Request, order: int, block_tokens: int, eos_token_ids: frozenset[int]
    ) -> None:
        sampling = request.sampling
        self.request = request
        self.order = order
        self.tokens = list(request.prompt_ids)
        self.chain = KeyChain(
            request.adapter.digest if request.adapter else "", self.tokens, block_tokens
        )
        self.computed = 0
        self.block_ids: tuple[int, ...] = ()
        self.row_adapter: RowAdapter | None = None
        self.lane = -1
        self.committed_blocks = 0
        self.cached_tokens: int | None = None
        self.passes = 0
        self.ended = False
        self._stop_ids = sampling.stop_token_ids
        if not sampling.ignore_eos:
            self._stop_ids = self._stop_ids | eos_token_ids

    @property
    def pending(self) -> int:
        """Tokens whose KV is still to be computed before the next one can be sampled."""
        return len(self.tokens) - self.computed

    @property
    def output_tokens(self) -> int:
        """Tokens sampled so far."""
        return len(self.tokens) - len(self.request.prompt_ids)

    def row(self, count: int, block_tokens: int) -> Row:
        """The row that computes the next ``count`` pending tokens."""
        end = self.computed + count
        sample = end == len(self.tokens)
        sampling = self.request.sampling
        penalised = sample and _has_penalties(sampling)
        early = sample and self.output_tokens < sampling.min_tokens
        return Row(
            request_id=self.request.id,
            token_ids=tuple(self.tokens[self.computed : end]),
            start=self.computed,
            block_ids=self.block_ids[: -(-end // block_tokens)],
            sample=sample,
            sampling=sampling,
            history_ids=tuple(self.tokens) if penalised else (),
            prompt_tokens=len(self.request.prompt_ids) if penalised else 0,
            output_tokens=self.output_tokens,
            adapter=self.row_adapter,
            suppressed_ids=tuple(sorted(self._stop_ids)) if early else (),
            lane=self.lane,
        )

    def finish_reason(self, tokens_max: int) -> FinishReason | None:
        """Whether the token sampled last ended the request; ``tokens_max`` bounds its length."""
        sampling = self.request.sampling
        if self.output_tokens > sampling.min_tokens and self.tokens[-1] in self._stop_ids:
            return FinishReason.STOP
        if self.output_tokens >= sampling.max_tokens or len(self.tokens) >= tokens_max:
            return FinishReason.LENGTH
        return None


def _has_penalties(sampling: SamplingParams) -> bool:
    return (
        sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
        or sampling.repetition_penalty != 1.0
    )
