"""Scores on disk: ``results.jsonl``, a line for each adapter, task and metric, appended as it ends.

A line that is there is not measured again, so that a run which was killed goes on where it was. A
last line cut short by a crash is dropped.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from shoal.adapters.training.errors import RunDirectoryError


class Key(NamedTuple):
    """What a score is of. Two runs with the same key would measure the same thing.

    ``task_digest`` is of the task and of the tokens that it became.
    """

    base_digest: str
    dtype: str
    digest: str
    task_digest: str
    metric: str


@dataclass(frozen=True, slots=True)
class Score:
    """One adapter on one task.

    Attributes:
        adapter: its name then; ``base`` is the base itself.
        digest: of the adapter's record, by which it is known again; '' for the base.
        values: see ``scoring.py``.
        items: how many items (of texts: positions) they are over.
    """

    base_digest: str
    dtype: str
    adapter: str
    digest: str
    task: str
    task_digest: str
    metric: str
    items: int
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What it is a score of."""
        return Key(self.base_digest, self.dtype, self.digest, self.task_digest, self.metric)


class Results:
    """Scores by key, in memory or in a file as well."""

    def __init__(self, path: Path | None = None) -> None:
        """Read what is there.

        Raises:
            RunDirectoryError: the file cannot be read, or holds something else.
        """
        self._path = path
        self._scores: dict[Key, Score] = {}
        if path is not None and path.exists():
            self._read(path)

    def __contains__(self, key: Key) -> bool:
        return key in self._scores

    def __getitem__(self, key: Key) -> Score:
        return self._scores[key]

    def __len__(self) -> int:
        return len(self._scores)

    def append(self, score: Score) -> None:
        """Keep a score; durable when this returns."""
        self._scores[score.key] = score
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(score)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, path: Path) -> None:
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise RunDirectoryError(f"{path} cannot be read: {error.strerror}") from error
        complete = raw[: raw.rfind(b"\n") + 1]
        for number, line in enumerate(complete.splitlines(), 1):
            try:
                score = Score(**json.loads(line))
            except (ValueError, TypeError) as error:
                rule = f"is not what an evaluation writes: {error}; give another folder"
                raise RunDirectoryError(f"{path}, line {number} {rule}") from error
            self._scores[score.key] = score
        if len(complete) < len(raw):
            with path.open("r+b") as file:
                file.truncate(len(complete))
