"""A record -> token ids with the supervised ones marked.

Supervised are, in a chat, the content *and* the end-of-turn token of every assistant turn;
otherwise the completion and an end token after it. Prompts are never supervised.

Each prompt is tokenised apart from the text that answers it, just as a server sees it, so that the
first supervised token is exactly the first one the model will have to produce.
"""

from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from shoal.adapters.training.data.example import Example
from shoal.adapters.training.data.records import Record, RecordRejected
from shoal.adapters.training.errors import DataRejected


def encode(path: Path, record: Record, tokenizer: Any) -> Example:
    """Tokenise one record whole.

    Raises:
        DataRejected: the chat template refuses it, or does not render turn after turn.
    """
    try:
        return tokenised(record, tokenizer)
    except RecordRejected as rejected:
        raise DataRejected(path, record.line, str(rejected)) from rejected


def tokenised(record: Record, tokenizer: Any) -> Example:
    """As ``encode``; raises ``RecordRejected``, for callers that collect what is wrong."""
    if record.messages:
        parts = _chat_parts(record, tokenizer)
        pieces = [(_ids(tokenizer, text), learnt) for text, learnt in parts]
    else:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        prompt = list(tokenizer(record.prompt)["input_ids"])
        pieces = [(prompt, False), (_ids(tokenizer, record.completion) + end, True)]
    ids = tuple(token for piece, _ in pieces for token in piece)
    return Example(ids, tuple(learnt for piece, learnt in pieces for _ in piece))


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
        rendered: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise RecordRejected(f"the chat template refuses it: {error}") from error
    return rendered


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
