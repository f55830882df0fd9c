"""JSONL: one JSON object a line, in UTF-8; blank lines are skipped."""

import json
from collections.abc import Iterator
from pathlib import Path

from shoal.adapters.training.data.records import Problems, Record, RecordRejected, record_of
from shoal.adapters.training.errors import DataRejected


def read_jsonl(path: Path) -> Iterator[Record]:
    """The records in the file's order.

    Raises:
        DataRejected: the file cannot be read; or, after its last line, what is wrong with lines.
    """
    problems = Problems(path)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    yield record_of(_value(line, first=number == 1), number)
                except RecordRejected as rejected:
                    problems.add(number, str(rejected))
    except OSError as error:
        raise DataRejected(path, None, f"cannot be read: {error.strerror}") from error
    problems.raise_if_any()


def _value(line: bytes, *, first: bool) -> object:
    try:
        # Editors of one system put a byte-order mark before the first line.
        return json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        rule = f"is not JSON in UTF-8 (byte {error.start + 1} of the line is"
        raise RecordRejected(f"{rule} 0x{error.object[error.start]:02x})") from error
    except (ValueError, RecursionError) as error:
        raise RecordRejected(f"is not JSON in UTF-8 ({error})") from error
