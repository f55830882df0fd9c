"""What a record is, the rules it must keep, and how those that do not are reported together.

A record is either a chat, ``{"messages": [{"role": ..., "content": ...}, ...]}``, or
``{"prompt": ..., "completion": ...}``. Other keys are ignored. Where it came from (a line of JSONL,
a row of Parquet, an item of a task) is the business of the readers. No torch.
"""

from dataclasses import dataclass
from pathlib import Path

from shoal.adapters.training.errors import DataRejected

ROLES = ("system", "user", "assistant")
WANTED = 'needs either "messages", or "prompt" and "completion"'
# How many of a file's problems are listed; the rest is counted.
LISTED = 10


@dataclass(frozen=True, slots=True)
class Record:
    """One record of the data.

    Attributes:
        line: where it stands in the file, from 1 (a line, row or item).
        messages: the chat as (role, content) pairs, or empty.
        prompt: text before the completion when there is no chat.
        completion: text to learn when there is no chat.
    """

    line: int
    messages: tuple[tuple[str, str], ...] = ()
    prompt: str = ""
    completion: str = ""


class RecordRejected(Exception):
    """A record breaks a rule; the text is the rule. Becomes part of a ``DataRejected``."""


class Problems:
    """Collects what is wrong with a file's records, so that it is said at once."""

    def __init__(self, path: Path, place: str = "line") -> None:
        self.path = path
        self.place = place
        self.count = 0
        self.first: list[tuple[int, str]] = []

    def add(self, line: int, rule: str) -> None:
        """Note one; beyond the tenth only their number is kept."""
        self.count += 1
        if len(self.first) < LISTED:
            self.first.append((line, rule))

    def raise_if_any(self) -> None:
        """Refuse the file when a problem was noted.

        Raises:
            DataRejected: about the first ones.
        """
        if self.first:
            (line, rule), *others = self.first
            unlisted = self.count - len(self.first)
            raise DataRejected(self.path, line, rule, tuple(others), unlisted, self.place)


def record_of(value: object, line: int) -> Record:
    """Check what a reader found.

    Args:
        value: the decoded JSON object, or the columns of a row that are not null.
        line: where it stands.

    Raises:
        RecordRejected: it breaks a rule.
    """
    if not isinstance(value, dict):
        raise RecordRejected("must be a JSON object")
    if ("messages" in value) == ("prompt" in value or "completion" in value):
        raise RecordRejected(WANTED)
    if "messages" in value:
        return Record(line, messages=_messages(value["messages"]))
    for name in ("prompt", "completion"):
        text = value.get(name)
        if not isinstance(text, str) or not text:
            raise RecordRejected(f'"{name}" must be a string that is not empty')
        _require_unicode(f'"{name}"', text)
    return Record(line, prompt=value["prompt"], completion=value["completion"])


def _messages(value: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise RecordRejected('"messages" must be a list that is not empty')
    messages = []
    for index, message in enumerate(value):
        where = f'"messages"[{index}]'
        if not isinstance(message, dict):
            raise RecordRejected(f"{where} must be an object")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise RecordRejected(f"{where} has role {role!r}, not one of {ROLES}")
        if not isinstance(content, str) or not content.strip():
            raise RecordRejected(f"{where} needs a content string that is not empty")
        _require_unicode(where, content)
        messages.append((role, content))
    if messages[0][0] == "assistant":
        raise RecordRejected('"messages" must not begin with the assistant')
    if all(role != "assistant" for role, _ in messages):
        raise RecordRejected('"messages" has no assistant turn to learn from')
    return tuple(messages)


def _require_unicode(where: str, text: str) -> None:
    """JSON can spell half of a surrogate pair, which is no character and which UTF-8 lacks."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        rule = f"{where} has an unpaired surrogate, which is not a character"
        raise RecordRejected(rule) from error
