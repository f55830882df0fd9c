"""What request fields are made of: the lists of known fields, ``Body``, and checked field types.

A field is used (declared in ``schemas.py``), harmless and ignored, or known and refused unless its
value asks for nothing. Anything else is unknown, and refused by name.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    model_validator,
)

from shoal.server.errors import InvalidRequest

STOP_STRINGS_MAX = 16
STOP_CHARS_MAX = 256
STOP_IDS_MAX = 256
LOGPROBS_MAX = 20
LOGIT_BIAS_MAX = 1024
CHOICES_MAX = 128  # prompts x n of one HTTP request

# Change nothing about the answer, so they may be there. OpenAI's client and tools send them.
IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "parallel_tool_calls",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
    }
)
# Would change the answer, and are not supported: accepted only with a value that asks for nothing.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "web_search_options": (),
    "verbosity": ("medium",),
    "best_of": (1,),
    "suffix": ("",),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "documents": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "spaces_between_special_tokens": (True,),
    "priority": (0,),
}
NEUTRAL_IN_MESSAGE: Mapping[str, tuple[object, ...]] = {
    "tool_calls": ([],),
    "function_call": (),
    "refusal": (),
    "audio": (),
    "annotations": ([],),
}


class Body(BaseModel):
    """A JSON object whose every field is known."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    ignored: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        kept: dict[object, object] = {}
        unknown = False
        for name, value in data.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name in cls.neutral:
                allowed = cls.neutral[name]
                if value is not None and value not in allowed:
                    rule = f"; leave it out or send {allowed[0]!r}" if allowed else "; leave it out"
                    raise InvalidRequest(
                        f"`{name}` is not supported by this server{rule}", param=name
                    )
            elif name not in cls.ignored and not unknown:
                unknown = True
                kept[name] = value  # pydantic's extra="forbid" names it; the first is enough
        return kept


def _is_text(value: object) -> bool:
    """Whether it is a string that UTF-8 can hold: JSON can write half a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(value: str) -> str:
    if not _is_text(value):
        raise ValueError("must be text that UTF-8 can hold")
    return value


def _few_biases(value: object) -> object:
    """Before each entry is looked at, and reported."""
    if isinstance(value, dict) and len(value) > LOGIT_BIAS_MAX:
        raise ValueError(f"must have at most {LOGIT_BIAS_MAX} entries")
    return value


def _stops(value: object) -> tuple[str, ...]:
    found = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(map(_is_text, found)):
        raise ValueError("must be a string or a list of strings")
    if len(found) > STOP_STRINGS_MAX:
        raise ValueError(f"must hold at most {STOP_STRINGS_MAX} strings")
    if not all(0 < len(stop) <= STOP_CHARS_MAX for stop in found):
        raise ValueError(f"each string must have 1 to {STOP_CHARS_MAX} characters")
    return tuple(found)


def _prompts(value: object) -> list[str] | list[list[int]]:
    rule = "must be a string, a list of strings, a list of token ids, or a list of such lists"
    if isinstance(value, str) and _is_text(value):
        return [value]
    if not isinstance(value, list):
        raise ValueError(rule)
    if not value:
        raise ValueError("must not be empty")
    if all(type(item) is int for item in value):
        return [value]
    if not all(map(_is_text, value)) and not all(
        isinstance(item, list) and all(type(i) is int for i in item) for item in value
    ):
        raise ValueError(rule)
    if len(value) > CHOICES_MAX:
        raise ValueError(f"must hold at most {CHOICES_MAX} prompts")
    return value


def _content(value: object) -> str | None:
    if value is None or (isinstance(value, str) and _is_text(value)):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(f"a part has type {kind!r}: only text parts are supported")
        if set(part) != {"type", "text"} or not _is_text(part["text"]):
            raise ValueError('a text part must be {"type": "text", "text": string}')
        texts.append(part["text"])
    return "".join(texts)


Stops = Annotated[
    tuple[str, ...], PlainValidator(_stops, json_schema_input_type=str | list[str] | None)
]
Prompts = Annotated[
    list[str] | list[list[int]],
    PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]
Content = Annotated[
    str | None,
    PlainValidator(_content, json_schema_input_type=str | list[dict[str, str]] | None),
]
Text = Annotated[str, AfterValidator(_text)]
TokenId = Annotated[int, Field(ge=0)]
# The first wrong one is reported: an error for each of a million would keep the others waiting.
ManyTokenIds = Annotated[list[TokenId], FailFast()]
LogitBias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_few_biases)
]
