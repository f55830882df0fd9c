"""From a validated HTTP request to what the engine is asked: token ids, limits, parameters.

Owns the rules that need the model's facts (context length, vocabulary) and the resolution of
``model``. Nothing is held yet when a ``Job`` exists: ``generation.py`` takes and gives back.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from shoal.adapters.blending import Blend
from shoal.adapters.errors import AdapterNameInvalid, AdapterNotFound
from shoal.adapters.registry.keys import Limits
from shoal.server.engine.request import SamplingParams
from shoal.server.errors import InvalidRequest, ModelNotFound, PromptTooLong
from shoal.server.http.caller import Caller
from shoal.server.http.schemas import Sampling
from shoal.server.http.services import Services

if TYPE_CHECKING:
    from shoal.adapters.library import AdapterInfo

# Texts longer than this are tokenized in a thread: they would hold up every other stream.
_INLINE_CHARS = 4096
_SEEDS = 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One HTTP request's work: ``n`` answers to each prompt.

    Attributes:
        model: as the client wrote it; answers repeat it.
        adapter: the version, or sum of versions, that the request runs with; None for the base.
        adapter_name: what the client calls it; of a sum, its versions and weights.
        arrival_s: monotonic time.
        deadline_s: monotonic time from which the answer is of no use, or None.
        tenant: who is charged for it.
        limits: what the tenant may take, and its share (``engine/fairness.py``).
    """

    id: str
    model: str
    adapter: "AdapterInfo | Blend[AdapterInfo] | None"
    adapter_name: str
    prompts: tuple[tuple[int, ...], ...]
    n: int
    sampling: SamplingParams
    stops: tuple[str, ...]
    include_stop: bool
    skip_special: bool
    created: int
    arrival_s: float
    deadline_s: float | None = None
    tenant: str = ""
    limits: Limits = field(default_factory=Limits)

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.n

    def prompt_of(self, index: int) -> tuple[int, ...]:
        """The prompt of choice ``index``: choices of one prompt are neighbours."""
        return self.prompts[index // self.n]

    def sampling_of(self, index: int) -> SamplingParams:
        """The parameters of choice ``index``: each of the ``n`` has a seed of its own."""
        if self.sampling.seed is None or self.n == 1:
            return self.sampling
        return replace(self.sampling, seed=(self.sampling.seed + index % self.n) % _SEEDS)

    @property
    def headers(self) -> dict[str, str]:
        """``x-shoal-adapter`` when an adapter is used; the base has none."""
        if self.adapter is None:
            return {}
        if isinstance(self.adapter, Blend):
            return {"x-shoal-adapter": self.adapter_name}
        return {"x-shoal-adapter": f"{self.adapter_name}@{self.adapter.version}"}

    @property
    def adapter_label(self) -> str | None:
        """What metrics count it under: all blends are ``_blend``, which no adapter can be called.

        Clients make them up as they go.
        """
        if isinstance(self.adapter, Blend):
            return "_blend"
        return self.adapter.reference if self.adapter else None


async def make_job(
    services: Services,
    body: Sampling,
    prompts: Sequence[Sequence[int]],
    *,
    caller: Caller,
    adapter: "AdapterInfo | Blend[AdapterInfo] | None",
    default_max_tokens: int | None,
    prompt_field: str,
    id_prefix: str,
    arrival_s: float,
) -> Job:
    """Check what needs the model's facts.

    Args:
        default_max_tokens: when the client gives no limit; None is what the context leaves.

    Raises:
        InvalidRequest, PromptTooLong.
    """
    for ids in prompts:
        if not ids:
            raise InvalidRequest(
                f"`{prompt_field}` has no tokens: must have at least one", param=prompt_field
            )
    longest = max(len(ids) for ids in prompts)
    return Job(
        id=f"{id_prefix}-{secrets.token_hex(12)}",
        model=body.model,
        adapter=adapter,
        adapter_name=_name(caller, adapter),
        prompts=tuple(tuple(ids) for ids in prompts),
        n=body.choices_per_prompt,
        sampling=_sampling(
            body,
            max_tokens=_max_tokens(services, body, longest, default_max_tokens, prompt_field),
            vocab_size=services.vocab_size,
        ),
        stops=body.stop,
        include_stop=body.include_stop_str_in_output,
        skip_special=body.skip_special_tokens,
        created=int(time.time()),
        arrival_s=arrival_s,
        deadline_s=None if body.deadline_ms is None else arrival_s + body.deadline_ms / 1000,
        tenant=caller.owner,
        limits=caller.limits,
    )


async def resolve(services: Services, caller: Caller, model: str) -> "AdapterInfo | None":
    """The adapter version that ``model`` means to ``caller`` now; None for the base.

    Raises:
        ModelNotFound: neither.
    """
    if model == services.model_name:
        return None
    owner, reference = caller.acts_on(model)
    try:
        return await services.lookup(
            lambda: services.library.resolve(reference, owner=owner), owner=caller.owner
        )
    except (AdapterNotFound, AdapterNameInvalid) as error:
        raise ModelNotFound(
            f"no model {model!r}: it is neither the base {services.model_name!r} nor an adapter",
            param="model",
        ) from error


def _name(caller: Caller, adapter: "AdapterInfo | Blend[AdapterInfo] | None") -> str:
    if isinstance(adapter, Blend):
        return adapter.described(caller.name_of)
    return "" if adapter is None else caller.name_of(adapter)


async def encode(
    services: Services, caller: Caller, text: str, *, add_special_tokens: bool
) -> list[int]:
    """Tokenize ``text``; a long one in a thread."""
    if len(text) <= _INLINE_CHARS:
        return services.tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return await services.tokenize(
        lambda: services.tokenizer.encode(text, add_special_tokens=add_special_tokens),
        owner=caller.owner,
    )


async def encode_chat(
    services: Services,
    caller: Caller,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Apply the chat template and tokenize.

    Raises:
        InvalidRequest: the model has no template, or its template refuses these messages.
    """

    def apply() -> list[int]:
        return services.tokenizer.chat(messages, add_generation_prompt=add_generation_prompt)

    if sum(len(message["content"]) for message in messages) <= _INLINE_CHARS:
        return apply()
    return await services.tokenize(apply, owner=caller.owner)


def check_token_ids(services: Services, ids: Sequence[int], param: str) -> None:
    """Raise InvalidRequest unless every id is in the vocabulary."""
    if ids and not (min(ids) >= 0 and max(ids) < services.vocab_size):
        wrong = next(i for i in ids if not 0 <= i < services.vocab_size)
        raise InvalidRequest(
            f"`{param}` holds the token id {wrong}: must be from 0 to {services.vocab_size - 1}",
            param=param,
        )


def _max_tokens(
    services: Services, body: Sampling, prompt: int, default: int | None, prompt_field: str
) -> int:
    room = services.max_model_len - prompt
    if room < 1:
        raise PromptTooLong(
            f"`{prompt_field}` has {prompt} tokens: must be at most {services.max_model_len - 1},"
            f" as the model's context is {services.max_model_len} tokens, answer included",
            param=prompt_field,
        )
    if body.limit is None:
        return max(min(room, default or room), min(room, body.min_tokens))
    if body.limit > room:
        raise PromptTooLong(
            f"`{prompt_field}` has {prompt} tokens and max_tokens is {body.limit}: together"
            f" {prompt + body.limit}, must be at most {services.max_model_len}, the model's"
            " context",
            param="max_tokens",
        )
    return body.limit


def _sampling(body: Sampling, *, max_tokens: int, vocab_size: int) -> SamplingParams:
    if body.min_tokens > max_tokens:
        raise InvalidRequest(
            f"`min_tokens` is {body.min_tokens}: only {max_tokens} tokens can be generated",
            param="min_tokens",
        )
    for token_id in body.stop_token_ids or ():
        if token_id >= vocab_size:
            raise InvalidRequest(
                f"`stop_token_ids` holds {token_id}: must be below {vocab_size}",
                param="stop_token_ids",
            )
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        # Beyond the vocabulary it filters nothing, and any integer may be sent.
        top_k=min(max(body.top_k or 0, 0), vocab_size),
        min_p=_or(body.min_p, 0.0),
        seed=None if body.seed is None else body.seed % _SEEDS,
        stop_token_ids=frozenset(body.stop_token_ids or ()),
        ignore_eos=body.ignore_eos,
        min_tokens=body.min_tokens,
        logprobs=body.top_logprobs_wanted,
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=_logit_bias(body.logit_bias or {}, vocab_size),
    )


def _logit_bias(asked: Mapping[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    pairs: dict[int, float] = {}
    for key, bias in asked.items():
        # Not int(key) alone: it would take "1_0" and " 7".
        token_id = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else -1
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"`logit_bias` has the key {key[:32]!r}: must be a token id from 0 to"
                f" {vocab_size - 1}",
                param="logit_bias",
            )
        pairs[token_id] = bias
    return tuple(pairs.items())


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)
