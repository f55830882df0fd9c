"""Training data: JSONL records -> token ids with the supervised ones marked -> batches.

A record is either a chat, ``{"messages": [{"role": ..., "content": ...}, ...]}``, or
``{"prompt": ..., "completion": ...}``. Other keys are ignored. Supervised are, in a chat, the
content *and* the end-of-turn token of every assistant turn; otherwise the completion and an end
token after it. Prompts are never supervised. It knows nothing of models or optimisers.

Each prompt is tokenised apart from the text that answers it, just as a server sees it, so that the
first supervised token is exactly the first one the model will have to produce.

A record longer than the limit loses its end; one that would lose everything supervised is refused.
"""

import json
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from shoal.adapters.training.errors import DataRejected

log = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Record:
    """One line of the data.

    Attributes:
        line: where it stands in the file, from 1.
        messages: the chat as (role, content) pairs, or empty.
        prompt: text before the completion when there is no chat.
        completion: text to learn when there is no chat.
    """

    line: int
    messages: tuple[tuple[str, str], ...] = ()
    prompt: str = ""
    completion: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenised record: ids, and which of them are to be learnt (same length)."""

    input_ids: tuple[int, ...]
    supervised: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples padded on the right.

    Attributes:
        input_ids: ``(rows, length)`` int64.
        supervised: ``(rows, length)`` bool, False on padding.
        num_tokens: tokens that are not padding.
        num_supervised: tokens that count in the loss.
    """

    input_ids: Tensor
    supervised: Tensor
    num_tokens: int
    num_supervised: int


def read_records(path: Path) -> list[Record]:
    """Read and check a JSONL file; blank lines are skipped.

    Raises:
        DataRejected: the file cannot be read, is empty, or a line breaks a rule.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataRejected(path, None, f"cannot be read: {error.strerror}") from error
    records = [
        _parse_line(path, number, line) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not records:
        raise DataRejected(path, None, "holds no records; one JSON object a line is expected")
    return records


def load_examples(path: Path, tokenizer: Any, max_length: int) -> list[Example]:
    """Read a JSONL file and tokenise every record.

    Args:
        path: the file.
        tokenizer: a transformers tokenizer.
        max_length: tokens kept of a record.

    Raises:
        DataRejected: a line breaks a rule, or keeps nothing to learn within ``max_length``.
    """
    examples = []
    num_cut = 0
    for record in read_records(path):
        whole = encode(path, record, tokenizer)
        example = Example(whole.input_ids[:max_length], whole.supervised[:max_length])
        if not any(example.supervised[1:]):
            rule = f"has {len(whole.input_ids)} tokens and none to learn within max-length"
            raise DataRejected(path, record.line, f"{rule} {max_length}")
        num_cut += len(whole.input_ids) > max_length
        examples.append(example)
    if num_cut:
        log.warning("cut records=%d max_length=%d path=%s", num_cut, max_length, path)
    return examples


def encode(path: Path, record: Record, tokenizer: Any) -> Example:
    """Tokenise one record whole.

    Raises:
        DataRejected: the chat template refuses it, or does not render turn after turn.
    """
    if record.messages:
        parts = _chat_parts(path, record, tokenizer)
        pieces = [(_ids(tokenizer, text), learnt) for text, learnt in parts]
    else:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        prompt = list(tokenizer(record.prompt)["input_ids"])
        pieces = [(prompt, False), (_ids(tokenizer, record.completion) + end, True)]
    ids = tuple(token for piece, _ in pieces for token in piece)
    return Example(ids, tuple(learnt for piece, learnt in pieces for _ in piece))


def order_of(num_examples: int, seed: int) -> Iterator[int]:
    """Endless order of examples: a fresh permutation every epoch, decided by the seed alone."""
    epoch = 0
    while True:
        indices = list(range(num_examples))
        random.Random(f"{seed}:{epoch}").shuffle(indices)
        yield from indices
        epoch += 1


def collate(examples: Sequence[Example], pad_id: int, device: torch.device) -> Batch:
    """Pad examples on the right to the longest of them."""
    length = max(len(example.input_ids) for example in examples)
    ids = torch.full((len(examples), length), pad_id, dtype=torch.int64)
    supervised = torch.zeros((len(examples), length), dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
        supervised[row, : len(example.input_ids)] = torch.tensor(example.supervised)
    return Batch(
        input_ids=ids.to(device),
        supervised=supervised.to(device),
        num_tokens=sum(len(example.input_ids) for example in examples),
        # The first token of a row has nothing before it that could predict it.
        num_supervised=int(supervised[:, 1:].sum()),
    )


def _parse_line(path: Path, number: int, line: bytes) -> Record:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataRejected(path, number, f"is not JSON in UTF-8 ({error})") from error
    if not isinstance(value, dict):
        raise DataRejected(path, number, "must be a JSON object")
    if ("messages" in value) == ("prompt" in value or "completion" in value):
        raise DataRejected(path, number, 'needs either "messages", or "prompt" and "completion"')
    if "messages" in value:
        return Record(number, messages=_parse_messages(path, number, value["messages"]))
    for name in ("prompt", "completion"):
        if not isinstance(value.get(name), str) or not value[name]:
            raise DataRejected(path, number, f'"{name}" must be a string that is not empty')
    return Record(number, prompt=value["prompt"], completion=value["completion"])


def _parse_messages(path: Path, number: int, value: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise DataRejected(path, number, '"messages" must be a list that is not empty')
    messages = []
    for index, message in enumerate(value):
        where = f'"messages"[{index}]'
        if not isinstance(message, dict):
            raise DataRejected(path, number, f"{where} must be an object")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise DataRejected(path, number, f"{where} has role {role!r}, not one of {ROLES}")
        if not isinstance(content, str) or not content.strip():
            raise DataRejected(path, number, f"{where} needs a content string that is not empty")
        messages.append((role, content))
    if messages[0][0] == "assistant":
        raise DataRejected(path, number, '"messages" must not begin with the assistant')
    if all(role != "assistant" for role, _ in messages):
        raise DataRejected(path, number, '"messages" has no assistant turn to learn from')
    return tuple(messages)


def _chat_parts(path: Path, record: Record, tokenizer: Any) -> list[tuple[str, bool]]:
    """Split the rendered chat into consecutive texts, each to be learnt or not."""
    if not tokenizer.chat_template:
        raise DataRejected(path, record.line, "is a chat, but the base has no chat template")
    parts: list[tuple[str, bool]] = []
    done = ""
    for index, (role, _) in enumerate(record.messages):
        if role != "assistant":
            continue
        prompt = _render(path, record, tokenizer, index, add_generation_prompt=True)
        full = _render(path, record, tokenizer, index + 1, add_generation_prompt=False)
        if not (prompt.startswith(done) and full.startswith(prompt) and len(full) > len(prompt)):
            rule = f'the chat template does not render "messages"[{index}] as an addition to what'
            raise DataRejected(path, record.line, f"{rule} precedes it; use prompt/completion")
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


def _render(
    path: Path, record: Record, tokenizer: Any, count: int, *, add_generation_prompt: bool
) -> str:
    messages = [{"role": role, "content": text} for role, text in record.messages[:count]]
    try:
        rendered: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise DataRejected(path, record.line, f"the chat template refuses it: {error}") from error
    return rendered


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
