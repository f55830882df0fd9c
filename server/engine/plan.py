"""The seam between deciding and acting: a frozen plan of one step, and what came of it.

Pure: the scheduler builds a ``StepPlan`` from integers; a ``Runner`` turns it into tensors.
"""

from dataclasses import dataclass, field
from typing import Protocol

from shoal.adapters.spec import RowAdapter
from shoal.server.engine.request import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One sequence's share of a step.

    Attributes:
        request_id: whose row this is.
        token_ids: input tokens of this step: a prompt chunk, or the last sampled token.
        start: position of ``token_ids[0]`` in the sequence = tokens already in the KV cache.
        block_ids: all KV blocks of the sequence, covering ``start + len(token_ids)`` positions.
        sample: whether the last position's logits choose a token (false inside a prompt).
        sampling: the request's parameters.
        history_ids: prompt and output so far, given only when penalties or a seed need them.
        prompt_tokens: how many of ``history_ids`` are the prompt.
        output_tokens: tokens sampled so far; seeded sampling derives its noise from it.
        adapter: where this row's adapter sits, or None for the base.
        suppressed_ids: tokens that may not be sampled now (ends of sequence and stop ids while
            fewer than ``min_tokens`` tokens exist), sorted.
    """

    request_id: str
    token_ids: tuple[int, ...]
    start: int
    block_ids: tuple[int, ...]
    sample: bool
    sampling: SamplingParams
    history_ids: tuple[int, ...] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0
    adapter: RowAdapter | None = None
    suppressed_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLoad:
    """Copy a staged adapter from the host tier into the device bank before the forward pass."""

    adapter: RowAdapter


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What one forward pass does.

    ``rows`` has the one-token (decode) rows first, then prompt chunks; within each part, rows of
    the same adapter are neighbours, because grouped kernels read an adapter once per group.
    """

    rows: tuple[Row, ...]
    adapter_loads: tuple[AdapterLoad, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(row.token_ids) for row in self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Sampled tokens by request id, one for every row with ``sample`` set.

    ``logprobs`` holds an entry for the requests that asked for them. ``failed`` names requests
    whose row could not be computed (for example non-finite logits) and why; the others stand.
    """

    token_ids: dict[str, int]
    logprobs: dict[str, TokenLogprobs] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


class Runner(Protocol):
    """Executes plans. The only thing the engine loop asks of the device."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step. An exception fails the plan's requests, not the engine."""
        ...
