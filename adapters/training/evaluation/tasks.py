"""What adapters are evaluated on: items read from a source, checked once, with a digest.

A task is of one kind. ``answer``: a prompt whose answer is generated and compared. ``choice``: a
prompt with choices, of which the likeliest is taken. ``text``: texts on which distributions are
compared. It knows nothing of models. Reading from files is here; ``reasoning.py`` makes tasks from
reasoning-gym.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shoal.adapters.training.errors import DataRejected
from shoal.adapters.training.evaluation.extraction import REVISIONS, RULES
from shoal.adapters.training.evaluation.spec import TaskSpec

Kind = Literal["answer", "choice", "text"]
ROLES = ("system", "user", "assistant")
# How much of an answer is right, 0 to 1: (item's index, the extracted answer).
Grader = Callable[[int, str], float]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked: a chat (role, content), or else a text as it is."""

    messages: tuple[tuple[str, str], ...] = ()
    text: str = ""


@dataclass(frozen=True, slots=True)
class AnswerItem:
    """A prompt, and the answers of which any is right."""

    line: int
    prompt: Prompt
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ChoiceItem:
    """A prompt, at least two continuations of it, and the index of the right one."""

    line: int
    prompt: Prompt
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class TextItem:
    """A text."""

    line: int
    text: str


Item = AnswerItem | ChoiceItem | TextItem


@dataclass(frozen=True, slots=True)
class Task:
    """Items of one kind, and how they are scored.

    Attributes:
        name: what reports call it.
        source: where it came from, for error messages.
        digest: sha256 over everything that decides a score.
        max_tokens: ``answer``: tokens generated at most. ``text``: tokens of a window.
        limit: items at most; of texts also windows.
        extract: ``answer``: the rule that finds the answer in what was generated.
        grader: ``answer``: the task's own scorer; None compares with the item's answers.
    """

    name: str
    source: Path
    kind: Kind
    items: tuple[Item, ...]
    digest: str
    max_tokens: int
    limit: int | None = None
    extract: str = "whole"
    grader: Grader | None = field(default=None, compare=False)

    @property
    def metric(self) -> str:
        """The metric that scores tasks of this kind."""
        return METRIC_OF[self.kind]


METRIC_OF: Mapping[Kind, str] = {"answer": "exact", "choice": "choice", "text": "forgetting"}
METRICS = tuple(METRIC_OF.values())
DEFAULT_TOKENS: Mapping[Kind, int] = {"answer": 128, "choice": 1, "text": 256}


def read_task(spec: TaskSpec) -> Task:
    """Read and check a JSONL or text file; blank lines are skipped.

    A ``.txt`` file is one text. A line of JSONL is a JSON object with
    ``prompt`` or ``messages``, and ``answer`` (a string or a list of strings); or with ``choices``
    besides, ``answer`` being the index or the text of one of them; or with ``text``. Training data
    will do as well: ``prompt`` and ``completion``, or ``messages`` that end with the assistant.

    Raises:
        DataRejected: the file cannot be read, is empty, or a line breaks a rule or is of another
            kind than those before it; names the line.
        OptionRejected: an option of the spec.
    """
    path = Path(spec.source)
    spec.allow(("name", "limit", "max_tokens", "extract", "length"))
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataRejected(path, None, f"cannot be read: {error.strerror}") from error
    items: list[Item] = []
    if path.suffix == ".txt":
        items.append(TextItem(1, _decoded(path, 1, raw)))
    else:
        for number, line in enumerate(raw.splitlines(), 1):
            if not line.strip():
                continue
            item = _item(path, number, line)
            if items and type(item) is not type(items[0]):
                rule = f"is of another kind than line {items[0].line}: a task has one kind"
                raise DataRejected(path, number, rule)
            items.append(item)
    if not items:
        raise DataRejected(path, None, "holds no items; one JSON object a line is expected")
    return make_task(spec.text("name") or path.stem, path, tuple(items), spec)


def make_task(
    name: str,
    source: Path,
    items: tuple[Item, ...],
    spec: TaskSpec,
    grader: Grader | None = None,
    graded_by: str = "",
) -> Task:
    """A task of checked items.

    Args:
        spec: ``limit``, ``max_tokens`` (``length`` of texts) and ``extract``.
        graded_by: identifies what ``grader`` does, for the digest.

    Raises:
        OptionRejected: an option of the spec.
    """
    kind = _kind_of(items[0])
    if kind == "text":
        spec.forbid(("max_tokens", "extract"), "belongs to tasks whose answers are generated")
        tokens = spec.integer("length", at_least=2)
    else:
        spec.forbid(("length",), "belongs to texts")
        tokens = spec.integer("max_tokens")
    if kind == "choice":
        spec.forbid(("max_tokens", "extract"), "belongs to tasks whose answers are generated")
    extract = spec.choice("extract", tuple(RULES)) or "whole"
    max_tokens = tokens or DEFAULT_TOKENS[kind]
    limit = spec.integer("limit")
    items = items[:limit]
    plain: Any = [_plain(item) for item in items]
    windows = limit if kind == "text" else None
    rule = f"{extract} {REVISIONS[extract]}" if extract in REVISIONS else extract
    decides = json.dumps([kind, plain, max_tokens, rule, graded_by, windows], sort_keys=True)
    digest = hashlib.sha256(decides.encode()).hexdigest()
    return Task(name, source, kind, items, digest, max_tokens, limit, extract, grader)


def _kind_of(item: Item) -> Kind:
    if isinstance(item, AnswerItem):
        return "answer"
    return "choice" if isinstance(item, ChoiceItem) else "text"


def _plain(item: Item) -> list[object]:
    """What of an item decides a score."""
    if isinstance(item, TextItem):
        return [item.text]
    prompt = [item.prompt.messages, item.prompt.text]
    if isinstance(item, ChoiceItem):
        return [prompt, item.choices, item.answer]
    return [prompt, item.answers]


def _decoded(path: Path, number: int, raw: bytes) -> str:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise DataRejected(path, number, f"is not UTF-8 ({error})") from error
    if not text.strip():
        raise DataRejected(path, number, "holds no text")
    return text


def _item(path: Path, number: int, line: bytes) -> Item:
    def refuse(rule: str) -> DataRejected:
        return DataRejected(path, number, rule)

    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise refuse(f"is not JSON in UTF-8 ({error})") from error
    try:
        return _parsed(value, number)
    except _BreaksRule as broken:
        raise refuse(str(broken)) from None


class _BreaksRule(Exception):
    """What is wrong with a line."""


def _parsed(value: object, number: int) -> Item:
    if not isinstance(value, dict):
        raise _BreaksRule("must be a JSON object")
    kinds = [key for key in ("text", "prompt", "messages") if key in value]
    if len(kinds) != 1:
        raise _BreaksRule('needs exactly one of "text", "prompt" and "messages"')
    if kinds == ["text"]:
        return TextItem(number, _string(value, "text"))
    answer: Any = value.get("answer")
    if kinds == ["prompt"]:
        prompt = Prompt(text=_string(value, "prompt"))
        if "answer" not in value and "completion" in value:
            answer = _string(value, "completion")
    else:
        messages = _messages(value["messages"])
        if messages[-1][0] == "assistant":
            if "answer" in value or "choices" in value:
                raise _BreaksRule('"messages" ends with the assistant, and there is an "answer"')
            answer = messages[-1][1]
            messages = messages[:-1]
        if not messages or messages[-1][0] != "user":
            raise _BreaksRule('"messages" must end with the user, who is answered')
        prompt = Prompt(messages=messages)
    if "choices" in value:
        return _choice_item(value, number, prompt, answer)
    answers: list[str] = answer if isinstance(answer, list) else [answer]
    if not answers or not all(isinstance(text, str) and text.strip() for text in answers):
        raise _BreaksRule('"answer" must be a string that is not empty, or a list of such')
    for text in answers:
        _require_unicode("answer", text)
    return AnswerItem(number, prompt, tuple(answers))


def _choice_item(value: dict[str, Any], number: int, prompt: Prompt, answer: object) -> ChoiceItem:
    choices = value["choices"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise _BreaksRule('"choices" must be a list of at least two strings')
    if not all(isinstance(text, str) and text for text in choices):
        raise _BreaksRule('"choices" must be strings that are not empty')
    for text in choices:
        _require_unicode("choices", text)
    if len(set(choices)) < len(choices):
        raise _BreaksRule('"choices" has the same string twice')
    if isinstance(answer, str) and answer in choices:
        return ChoiceItem(number, prompt, tuple(choices), choices.index(answer))
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return ChoiceItem(number, prompt, tuple(choices), answer)
    raise _BreaksRule('"answer" must be one of "choices", or its index from 0')


def _messages(value: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise _BreaksRule('"messages" must be a list that is not empty')
    messages = []
    for index, message in enumerate(value):
        where = f'"messages"[{index}]'
        if not isinstance(message, dict):
            raise _BreaksRule(f"{where} must be an object")
        role = message.get("role")
        if role not in ROLES:
            raise _BreaksRule(f"{where} has role {role!r}, not one of {ROLES}")
        messages.append((role, _string(message, "content", where)))
    return tuple(messages)


def _string(value: Mapping[str, Any], name: str, where: str = "") -> str:
    text = value.get(name)
    if not isinstance(text, str) or not text.strip():
        raise _BreaksRule(f'{where} "{name}" must be a string that is not empty'.strip())
    _require_unicode(name, text)
    return text


def _require_unicode(name: str, text: str) -> None:
    """JSON can spell half of a surrogate pair, which is no character and which UTF-8 lacks."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise _BreaksRule(f'"{name}" has an unpaired surrogate, which is not a character')
