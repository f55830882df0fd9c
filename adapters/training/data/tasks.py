"""A generated task as data: ``reasoning-gym:NAME:size=1000,seed=1``.

Needs reasoning-gym (the extra ``tasks``). Each item becomes a chat of its question and answer.
Options after the name are the generator's own; ``size`` and ``seed`` have defaults here, so that a
spec without them still names one fixed data set.
"""

import ast
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.adapters.training.data.records import Problems, Record, RecordRejected, record_of
from shoal.adapters.training.errors import DataRejected

PREFIX = "reasoning-gym:"
_DEFAULTS: Mapping[str, Any] = {"size": 1000, "seed": 1}


def read_task(spec: Path) -> list[Record]:
    """The items of a task as chats, in the generator's order.

    Args:
        spec: as above; a ``Path`` because the other sources of data are paths.

    Raises:
        DataRejected: reasoning-gym is missing, refuses the name or an option, or makes items that
            cannot be learnt from.
    """
    name, options = _parse(spec)
    # Its import and some generators draw from Python's global source, which is not ours to move.
    state = random.getstate()
    try:
        dataset = _dataset(spec, name, options)
        return _records(spec, [dataset[index] for index in range(len(dataset))])
    finally:
        random.setstate(state)


def _records(spec: Path, items: list[Any]) -> list[Record]:
    problems = Problems(spec, "item")
    records = []
    for number, item in enumerate(items, 1):
        turns = (("user", item["question"]), ("assistant", item["answer"]))
        messages = [{"role": role, "content": text} for role, text in turns]
        try:
            records.append(record_of({"messages": messages}, number))
        except RecordRejected as rejected:
            problems.add(number, str(rejected))
    problems.raise_if_any()
    return records


def _dataset(spec: Path, name: str, options: Mapping[str, Any]) -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        rule = "needs reasoning-gym: pip install 'shoal[tasks]'"
        raise DataRejected(spec, None, rule) from error
    try:
        return reasoning_gym.create_dataset(name, **options)
    # What a generator's own checks raise: a wrong name, option, or value.
    except (ValueError, TypeError, AssertionError) as error:
        raise DataRejected(spec, None, f"is refused by reasoning-gym: {error}") from error


def _parse(spec: Path) -> tuple[str, dict[str, Any]]:
    name, _, rest = str(spec).removeprefix(PREFIX).partition(":")
    if not name:
        raise DataRejected(spec, None, f"names no task; expected {PREFIX}NAME:size=1000,seed=1")
    options = dict(_DEFAULTS)
    for part in filter(None, rest.split(",")):
        key, equals, text = part.partition("=")
        if not equals or not key.isidentifier():
            raise DataRejected(spec, None, f"has the option {part!r}; expected key=value")
        try:
            options[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[key] = text
    return name, options
