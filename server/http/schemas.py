"""What clients may send: OpenAI's requests plus vLLM's extra fields, checked once, here.

Values are strict (``"5"`` is not 5). Which fields are ignored or refused is in ``fields.py``; rules
that need the model's facts (context length, vocabulary) are in ``jobs.py``.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from shoal.adapters.blending import PARTS_MAX, WEIGHT_MAX
from shoal.adapters.registry.names import TAGS_MAX
from shoal.server.errors import InvalidRequest
from shoal.server.http.fields import (
    CHOICES_MAX,
    IGNORED,
    LOGPROBS_MAX,
    NEUTRAL,
    NEUTRAL_IN_MESSAGE,
    STOP_IDS_MAX,
    Body,
    Content,
    LogitBias,
    ManyTokenIds,
    Prompts,
    Stops,
    Text,
    TokenId,
)

# A day: who waits for longer has no deadline.
DEADLINE_MAX_MS = 86_400_000


class StreamOptions(Body):
    """``stream_options``."""

    ignored = frozenset({"include_obfuscation"})

    include_usage: bool = False
    continuous_usage_stats: bool = False


class BlendPart(Body):
    """One adapter of ``adapters``, and how much of it."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    weight: Annotated[float, Field(ge=-WEIGHT_MAX, le=WEIGHT_MAX)]


class Sampling(Body):
    """The fields that chat and plain completions share."""

    ignored = IGNORED
    neutral = NEUTRAL

    model: Annotated[str, Field(min_length=1, max_length=256)]
    # Ours: a weighted sum of adapters in place of one as the model.
    adapters: Annotated[list[BlendPart], Field(min_length=1, max_length=PARTS_MAX)] | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES_MAX)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] = 0
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stops = ()
    stop_token_ids: Annotated[list[TokenId], Field(max_length=STOP_IDS_MAX)] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    # Nearer to 0 a logit would overflow.
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    logit_bias: LogitBias | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    # Ours: neither OpenAI nor vLLM has one. Milliseconds from the request's arrival here.
    deadline_ms: Annotated[int, Field(ge=1, le=DEADLINE_MAX_MS)] | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> "Sampling":
        limit = self.limit
        if limit is not None and self.min_tokens > limit:
            raise InvalidRequest(
                f"`min_tokens` is {self.min_tokens}: must be at most max_tokens ({limit})",
                param="min_tokens",
            )
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "`stream_options` needs `stream` to be true", param="stream_options"
            )
        return self

    @property
    def limit(self) -> int | None:
        """Tokens to generate at most, when the client said so."""
        return self.max_tokens

    @property
    def top_logprobs_wanted(self) -> int | None:
        """None, or how many alternatives to report beside each token."""
        raise NotImplementedError

    @property
    def choices_per_prompt(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def usage_in_stream(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_in_every_chunk(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


class Message(Body):
    """One chat message."""

    neutral = NEUTRAL_IN_MESSAGE

    role: Literal["system", "developer", "user", "assistant"]
    content: Content = None
    name: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> "Message":
        if self.content is None and self.role != "assistant":
            raise InvalidRequest(
                f"`messages` has a {self.role} message without `content`: must be a string or"
                " text parts",
                param="messages",
            )
        return self

    def as_template_input(self) -> dict[str, str]:
        """Role and text, as chat templates take them."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content or ""}


Messages = Annotated[list[Message], Field(min_length=1, max_length=4096)]


class ChatRequest(Sampling):
    """``POST /v1/chat/completions``."""

    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **NEUTRAL,
        "echo": (False,),
        "add_generation_prompt": (True,),
        "add_special_tokens": (False,),
    }

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=LOGPROBS_MAX)] | None = None

    @model_validator(mode="after")
    def _logprobs_asked(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("`top_logprobs` needs `logprobs` to be true", param="top_logprobs")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top_logprobs_wanted(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Sampling):
    """``POST /v1/completions``."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=LOGPROBS_MAX)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _fits(self) -> "CompletionRequest":
        total = len(self.prompt) * self.choices_per_prompt
        if total > CHOICES_MAX:
            raise InvalidRequest(
                f"`n` times the number of prompts is {total}: must be at most {CHOICES_MAX}",
                param="n",
            )
        if self.echo and self.logprobs is not None:
            raise InvalidRequest(
                "`echo` with `logprobs` is not supported: log-probabilities of the prompt are not"
                " computed",
                param="echo",
            )
        return self

    @property
    def top_logprobs_wanted(self) -> int | None:
        return self.logprobs


class TokenizeRequest(Body):
    """``POST /tokenize``: a prompt, or chat messages."""

    ignored = frozenset({"user"})

    model: str | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("give either `prompt` or `messages`", param="prompt")
        return self


class DetokenizeRequest(Body):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: ManyTokenIds


class ActivateRequest(Body):
    """``POST /v1/adapters/{name}/activate``."""

    version: Annotated[int, Field(ge=1, lt=2**31)]


class TagsRequest(Body):
    """``PUT /v1/adapters/{name}/tags``; what may be in it is the registry's rule."""

    tags: Annotated[dict[str, str], Field(max_length=TAGS_MAX)]


class LoadLoraRequest(Body):
    """vLLM's ``POST /v1/load_lora_adapter``."""

    ignored = frozenset({"load_inplace", "base_model_name"})

    lora_name: Annotated[str, Field(min_length=1, max_length=256)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]


class UnloadLoraRequest(Body):
    """vLLM's ``POST /v1/unload_lora_adapter``."""

    ignored = frozenset({"lora_int_id"})

    lora_name: Annotated[str, Field(min_length=1, max_length=256)]
