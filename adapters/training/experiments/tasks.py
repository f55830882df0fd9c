"""The generated tasks that adapters are trained and tested on, and a text to forget.

Made once, where reasoning-gym is installed, and written as JSONL: who trains only reads files.
Questions are drawn without repetition and shuffled, so that no split shares one with another.
"""

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.adapters.formats.container import write_atomically
from shoal.adapters.training.data import Record, read_records
from shoal.adapters.training.data.tasks import PREFIX
from shoal.adapters.training.errors import DataRejected

SPLITS: Mapping[str, int] = {"train": 4800, "valid": 200, "test": 300}
FORGETTING = "forgetting.jsonl"
# Words of a text of `FORGETTING`; a window of 256 tokens holds about that many.
_PASSAGE = 170
_PASSAGES = 32


@dataclass(frozen=True, slots=True)
class TaskSource:
    """One task.

    Attributes:
        generator: its name in reasoning-gym.
        options: the generator's.
        about: what it asks.
        max_tokens: generated at most for an answer.
    """

    generator: str
    options: Mapping[str, object]
    about: str
    max_tokens: int

    def spec(self, size: int, seed: int) -> Path:
        """As the trainer's ``--data`` takes it."""
        options = {"size": size, "seed": seed, **self.options}
        text = ",".join(f"{key}={value}" for key, value in options.items())
        return Path(f"{PREFIX}{self.generator}:{text}")


# Difficulties are mixed within a task, so that neither a weak nor a strong adapter leaves the
# range in which accuracies can be told apart.
TASKS: Mapping[str, TaskSource] = {
    "words": TaskSource(
        "leg_counting",
        {"min_animals": 1, "max_animals": 2, "max_instances": 6},
        "arithmetic word problem: how many legs have 3 spiders and 2 humans?",
        6,
    ),
    "strings": TaskSource(
        "spell_backward",
        {"min_word_len": 3, "max_word_len": 4},
        "string manipulation: spell a word of three or four letters backward",
        12,
    ),
    "lists": TaskSource(
        "word_sorting",
        {"min_words": 2, "max_words": 6},
        "list manipulation: sort words, upwards or downwards",
        48,
    ),
    # Kinds from easy (leap years) to hard (weekdays of dates); who knew the kind alone and gave
    # its most frequent answer would be right in 21 % of them.
    "calendar": TaskSource(
        "calendar_arithmetic",
        {"offset_upper_bound": 30},
        "classification: seven kinds of questions on dates, answered by a weekday, a day of the "
        "month, a count of days, yes or no",
        8,
    ),
}


def path_of(data: Path, task: str, split: str) -> Path:
    """Where a split of a task lies."""
    return data / f"{task}.{split}.jsonl"


def missing(data: Path) -> list[Path]:
    """What `write_all` would make and is not there."""
    paths = [path_of(data, task, split) for task in TASKS for split in SPLITS]
    return [path for path in [*paths, data / FORGETTING] if not path.is_file()]


def write_all(data: Path, seed: int = 11) -> None:
    """Make every task's splits and the text.

    Raises:
        DataRejected: reasoning-gym is missing, or a task has too few different questions.
    """
    data.mkdir(parents=True, exist_ok=True)
    for name, source in TASKS.items():
        for split, records in splits_of(source, seed).items():
            lines = (
                {"messages": [{"role": role, "content": text} for role, text in record.messages]}
                for record in records
            )
            _write(path_of(data, name, split), lines)
    _write(data / FORGETTING, ({"text": passage} for passage in passages()))


def splits_of(
    source: TaskSource, seed: int, sizes: Mapping[str, int] = SPLITS
) -> dict[str, list[Record]]:
    """The splits of a task; no two records of all have the same question.

    Raises:
        DataRejected: there are too few.
    """
    wanted = sum(sizes.values())
    spec = source.spec(4 * wanted, seed)
    different = {record.messages[0][1]: record for record in read_records(spec)}
    if len(different) < wanted:
        raise DataRejected(spec, None, f"has {len(different)} questions, {wanted} are needed")
    records = list(different.values())
    random.Random(f"split:{seed}").shuffle(records)
    splits = {}
    for name, size in sizes.items():
        splits[name], records = records[:size], records[size:]
    return splits


def passages(text: str | None = None) -> list[str]:
    """English prose in pieces that fit a window: what a fine-tuned model should not unlearn.

    Args:
        text: None: "In the Year 2889" (Jules Verne, 1889; public domain), which reasoning-gym has.
    """
    words = (_story() if text is None else text).split()
    pieces = [" ".join(words[at : at + _PASSAGE]) for at in range(0, len(words), _PASSAGE)]
    return pieces[:_PASSAGES]


def _story() -> str:
    from importlib.resources import files

    story = files("reasoning_gym") / "data" / "in_the_year_2889.txt"
    text = story.read_text(encoding="utf-8")
    # Without what its transcribers put around it.
    start = text.find("Little though they seem to think of it")
    return text[max(start, 0) : text.find("*** END OF")]


def _write(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(path, [text.encode()])
