"""A request as the engine knows it: token ids, sampling parameters, an adapter's spec.

Pure. Text, chat templates and stop *strings* belong to the HTTP side, which owns the tokenizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from shoal.adapters.spec import AdapterSpec
from shoal.server.errors import ShoalError


class FinishReason(StrEnum):
    """Why a request ended; the values are OpenAI's, plus ``abort`` and ``deadline``."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    DEADLINE = "deadline"  # with what it had made by then


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose the next token, and when to stop.

    Validated where the request enters (``http/schemas.py``); the engine trusts it.

    Attributes:
        max_tokens: tokens to generate at most, >= 1.
        temperature: 0 is greedy.
        top_p, top_k, min_p: nucleus, top-k (0 = off) and min-p (0 = off) filters.
        seed: makes this request's sampling reproducible, whatever else is in the batch.
        stop_token_ids: generation ends after any of these; the token is not returned as text.
        ignore_eos: go on past the model's end-of-sequence tokens.
        min_tokens: ends of sequence and stop ids are suppressed before this many tokens.
        logprobs: None, or how many alternatives to report beside each sampled token (0..20).
        presence_penalty, frequency_penalty, repetition_penalty: OpenAI's and Hugging Face's.
        logit_bias: token id -> value added to its logit.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a client sent, ready for the engine.

    Attributes:
        id: unique in this process.
        prompt_ids: at least one token.
        adapter: the adapter *version* it runs with from start to end; None is the base.
            Its weights are in the host tier (pinned) before the request is submitted.
        tenant: who is charged for it.
        weight: the tenant's share relative to other tenants', 1 to 1024.
        arrival_s: monotonic time of arrival, passed in by the caller.
        deadline_s: the same clock's time at which it is of no use any more, or None.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    adapter: AdapterSpec | None = None
    tenant: str = ""
    weight: int = 1
    arrival_s: float = 0.0
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one sampled position, from the unmodified (temperature 1) logits."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class TokenEvent(NamedTuple):
    """What happened to a request in one step. Cheap to make: a step has hundreds.

    Exactly one event of a request has ``finish_reason`` or ``error`` set, and it is the last one.

    Attributes:
        token_ids: new tokens, usually one; a stop token is included when it ended the request.
        logprobs: one per token when the request asked for them.
        cached_tokens: prompt tokens whose KV came from the prefix cache (on the first event).
        queue_s: seconds from arrival to its first start (on the first event).
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    error: ShoalError | None = None
    cached_tokens: int = 0
    queue_s: float = 0.0

    def then(self, later: Sequence["TokenEvent"]) -> "TokenEvent":
        """All as one; ``later`` are the next of the same request, none of them an error."""
        if not later:
            return self
        token_ids, logprobs = list(self.token_ids), list(self.logprobs)
        for event in later:
            token_ids += event.token_ids
            logprobs += event.logprobs
        return self._replace(
            token_ids=tuple(token_ids),
            logprobs=tuple(logprobs),
            finish_reason=later[-1].finish_reason,
        )
