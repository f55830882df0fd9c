"""The seam between deciding and acting: a frozen plan of one step, and what came of it.

Pure: the scheduler builds a ``StepPlan`` from integers; a ``Runner`` turns it into tensors.
"""

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from shoal.adapters.spec import RowAdapter
from shoal.server.engine.request import SamplingParams, TokenLogprobs

# Stands in ``Row.token_ids`` for the token that the step before this one samples for the row's
# lane. The plan was made before that token was known.
UNKNOWN_TOKEN = -1


class Row(NamedTuple):
    """One sequence's share of a step.

    A named tuple, because a frozen dataclass takes three times as long to make, and a step has
    hundreds of rows.

    Attributes:
        request_id: whose row this is.
        token_ids: input tokens of this step: a prompt chunk, or the last sampled token, which
            is ``UNKNOWN_TOKEN`` while the step that samples it is under way.
        start: position of ``token_ids[0]`` in the sequence = tokens already in the KV cache.
        block_ids: all KV blocks of the sequence, covering ``start + len(token_ids)`` positions.
        sample: whether the last position's logits choose a token (false inside a prompt).
        sampling: the request's parameters.
        history_ids: prompt and output so far, given only when penalties or a seed need them.
        prompt_tokens: how many of ``history_ids`` are the prompt.
        output_tokens: tokens sampled before this row's, unknown ones included; seeded sampling
            derives its noise from it.
        adapter: where this row's adapter sits, or None for the base.
        suppressed_ids: tokens that may not be sampled now (ends of sequence and stop ids while
            fewer than ``min_tokens`` tokens exist), sorted.
        lane: a number below ``max_num_seqs`` that is this sequence's from its start until it has
            ended or was preempted, and its last step has landed. Unique among the rows of all
            plans under way, but for those of the same sequence.
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
    lane: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLoad:
    """Copy a staged adapter from the host tier into the device bank."""

    adapter: RowAdapter


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What one forward pass does.

    ``rows`` has the one-token (decode) rows first, then prompt chunks; within each part, rows of
    the same adapter are neighbours, because grouped kernels read an adapter once per group.

    ``adapter_loads`` are of these rows, and so come before the forward pass; ``prefetches`` are
    for rows of later steps, and this one need not wait for them.
    """

    rows: tuple[Row, ...]
    adapter_loads: tuple[AdapterLoad, ...] = ()
    prefetches: tuple[AdapterLoad, ...] = ()

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


class DeviceLost(Exception):
    """The device takes no more work, in this process: every later step would fail too."""


class Pending(Protocol):
    """A step under way."""

    def wait(self) -> StepResult:
        """Block until the step is over; raises what the step raised. Called once."""
        ...


@dataclass(frozen=True, slots=True)
class Done:
    """A step that was over when ``submit`` returned."""

    result: StepResult

    def wait(self) -> StepResult:
        return self.result


class Runner(Protocol):
    """Executes plans, in the order they are given. All that the engine loop asks of the device.

    Attributes:
        lookahead: whether ``submit`` returns before the step is over and ``UNKNOWN_TOKEN`` is
            understood, so that the next plan may be given meanwhile.
    """

    lookahead: bool

    def submit(self, plan: StepPlan) -> Pending:
        """Begin a step. An exception, here or in ``wait``, fails the plan's requests only, but
        ``DeviceLost`` ends the engine."""
        ...
