"""The generated tasks that adapters are trained and tested on, and a text to forget.

Made once, where reasoning-gym is installed, and written as JSONL: who trains only reads files.
Questions are drawn without repetition and shuffled, so that no split shares one with another.
"""

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
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
        others: further generators and their options; each has the same share of the questions.
    """

    generator: str
    options: Mapping[str, object]
    about: str
    max_tokens: int
    others: tuple[tuple[str, Mapping[str, object]], ...] = ()

    @property
    def generators(self) -> tuple[str, ...]:
        """Their names, each once."""
        return tuple(dict.fromkeys((self.generator, *(name for name, _ in self.others))))

    def specs(self, size: int, seed: int) -> list[Path]:
        """Each generator's, for so many items of each, as the trainer's ``--data`` takes it."""
        made = []
        for generator, own in ((self.generator, self.options), *self.others):
            options = {"size": size, "seed": seed, **own}
            text = ",".join(f"{key}={value}" for key, value in options.items())
            made.append(Path(f"{PREFIX}{generator}:{text}"))
        return made


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
    # A third is learnt early (relations), a third later (a weekday so many days on), and a third
    # has seven kinds of questions, few of each: none of it leaves all methods at one end.
    "mixed": TaskSource(
        "family_relationships",
        {"min_family_size": 4, "max_family_size": 8},
        "classification: one person's relation to another, the weekday some days before or after a "
        "date, and seven kinds of questions on dates",
        8,
        (
            ("calendar_arithmetic", {"tasks": "['weekday_offset']", "offset_upper_bound": 20}),
            ("calendar_arithmetic", {"offset_upper_bound": 30}),
        ),
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
    specs = source.specs(4 * wanted, seed)
    share = -(-wanted // len(specs))
    different: dict[str, Record] = {}
    for spec in specs:
        fresh = {record.messages[0][1]: record for record in read_records(spec)}
        for question in different.keys() & fresh.keys():
            del fresh[question]
        if len(fresh) < share:
            raise DataRejected(spec, None, f"has {len(fresh)} questions, {share} are needed")
        # A generator alone is drawn from whole, so that one added elsewhere changes nothing here.
        different.update(islice(fresh.items(), share if source.others else None))
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
