"""``experiments.jsonl``: every result, one line each, appended as it is known. No torch.

Kinds of lines (``kind``): ``run`` (one trained adapter), ``score`` (its accuracy and forgetting),
``cost`` (one method's initialisation, step and memory), ``controlled`` (one run of the MLP of
MiSS, Table 12). A line is on disk before the next result is begun, and a last line that a crash
cut short is dropped.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]


class Log:
    """The file and what is in it."""

    def __init__(self, path: Path) -> None:
        """Read what is there; an absent file is an empty one."""
        self.path = path
        self._lines: list[Line] = []
        if path.exists():
            whole = path.read_bytes()
            complete = whole[: whole.rfind(b"\n") + 1]
            if len(complete) < len(whole):
                with path.open("r+b") as file:
                    file.truncate(len(complete))
            self._lines = [json.loads(line) for line in complete.splitlines()]

    def append(self, kind: str, **fields: Any) -> None:
        """Add a line; durable when it returns."""
        line = {"kind": kind, **fields}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._lines.append(line)

    def lines(self, kind: str) -> Iterator[Line]:
        """All of a kind, in order."""
        return (line for line in self._lines if line["kind"] == kind)

    def by_id(self, kind: str) -> dict[str, Line]:
        """The newest line of a kind for each ``id``."""
        return {line["id"]: line for line in self.lines(kind)}
