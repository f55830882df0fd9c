"""A record -> token ids with the supervised ones marked.

Supervised are, in a chat, the content *and* the end-of-turn token of every assistant turn;
otherwise the completion and an end token after it. Prompts are never supervised.

Each prompt is tokenised apart from the text that answers it, just as a server sees it, so that the
first supervised token is exactly the first one the model will have to produce.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from shoal.adapters.training.data.example import Example
from shoal.adapters.training.data.records import Record, RecordRejected
from shoal.adapters.training.errors import DataRejected

# What templates that write today's date write: what Llama's does where there is no clock. With a
# clock a run would learn something else every day, and could not be resumed on the next. (A macro,
# since transformers hands templates nothing that can be called.)
_TODAY = {"%Y": "2024", "%y": "24", "%m": "07", "%d": "26", "%B": "July", "%b": "Jul"} | {
    "%A": "Friday", "%a": "Fri", "%H": "00", "%I": "12", "%p": "AM", "%M": "00", "%S": "00",
}  # fmt: skip
_NO_CLOCK = (
    "{%- macro strftime_now(form) -%}{{ form"
    + "".join(f"|replace('{code}', '{text}')" for code, text in _TODAY.items())
    + " }}{%- endmacro -%}"
)

# A text, whether it is to be learnt, and whether it begins a row as the tokenizer has rows begin.
Part = tuple[str, bool, bool]


def encode(path: Path, record: Record, tokenizer: Any) -> Example:
    """Tokenise one record whole.

    Raises:
        DataRejected: the chat template refuses it, or does not render turn after turn.
    """
    try:
        [example] = tokenised([parts_of(record, tokenizer)], tokenizer)
    except RecordRejected as rejected:
        raise DataRejected(path, record.line, str(rejected)) from rejected
    return example


def parts_of(record: Record, tokenizer: Any) -> list[Part]:
    """A record's texts, each to be tokenised apart from the others; raises ``RecordRejected``."""
    if record.messages:
        return [(text, learnt, False) for text, learnt in _chat_parts(record, tokenizer)]
    return [(record.prompt, False, True), (record.completion, True, False)]


def tokenised(records: Sequence[Sequence[Part]], tokenizer: Any) -> list[Example]:
    """Tokenise the parts of many records in two calls, which is much faster than part by part."""
    flat = [part for parts in records for part in parts]
    begins = iter(_ids(tokenizer, [text for text, _, begin in flat if begin], True))
    others = iter(_ids(tokenizer, [text for text, _, begin in flat if not begin], False))
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    examples = []
    for parts in records:
        pieces = [(next(begins if begin else others), learnt) for _, learnt, begin in parts]
        if parts[0][2]:  # a completion; chats have their template's end
            pieces.append((end, True))
        ids = tuple(token for piece, _ in pieces for token in piece)
        examples.append(Example(ids, tuple(learnt for piece, learnt in pieces for _ in piece)))
    return examples


def _chat_parts(record: Record, tokenizer: Any) -> list[tuple[str, bool]]:
    """Split the rendered chat into consecutive texts, each to be learnt or not."""
    if not tokenizer.chat_template:
        raise RecordRejected("is a chat, but the base has no chat template")
    parts: list[tuple[str, bool]] = []
    done = ""
    for index, (role, _) in enumerate(record.messages):
        if role != "assistant":
            continue
        prompt = _render(record, tokenizer, index, add_generation_prompt=True)
        full = _render(record, tokenizer, index + 1, add_generation_prompt=False)
        if not (prompt.startswith(done) and full.startswith(prompt) and len(full) > len(prompt)):
            rule = f'the chat template does not render "messages"[{index}] as an addition to what'
            raise RecordRejected(f"{rule} precedes it; use prompt/completion")
        answer, after = _split_at_end(full[len(prompt) :], tokenizer)
        parts += [(prompt[len(done) :], False), (answer, True), (after, False)]
        done = full
    return [part for part in parts if part[0]]


def _split_at_end(text: str, tokenizer: Any) -> tuple[str, str]:
    """Cut after the last special token: the turn's end is learnt, the white space behind is not."""
    added = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special}
    ends = [text.rfind(token) + len(token) for token in special if token in text]
    cut = max(ends, default=len(text))
    return text[:cut], text[cut:]


def _render(record: Record, tokenizer: Any, count: int, *, add_generation_prompt: bool) -> str:
    messages = [{"role": role, "content": text} for role, text in record.messages[:count]]
    try:
        template = tokenizer.get_chat_template()
        rendered: str = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=_NO_CLOCK + template if "strftime_now" in template else None,
        )
    # A template is the model author's program: whatever it trips over, it is the messages.
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise RecordRejected(f"the chat template refuses it: {error}") from error
    return rendered


def _ids(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=special)["input_ids"] if texts else []
