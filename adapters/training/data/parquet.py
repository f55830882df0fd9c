"""Parquet: the columns ``messages`` (a list of structs), or ``prompt`` and ``completion``.

Needs pyarrow (the extra ``train``). Rows are counted from 1. A column that is null in a row counts
as absent there, so that one file can hold chats and completions.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shoal.adapters.training.data.records import (
    WANTED,
    Problems,
    Record,
    RecordRejected,
    record_of,
)
from shoal.adapters.training.errors import DataRejected

MAGIC = b"PAR1"
_COLUMNS = ("messages", "prompt", "completion")
_ROWS_AT_ONCE = 4096


def read_parquet(path: Path) -> Iterator[Record]:
    """The records in the file's order.

    Raises:
        DataRejected: the file cannot be read, pyarrow is missing, or the columns are others; or,
            after the last row, what is wrong with rows.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        rule = "is Parquet, which needs pyarrow: pip install 'shoal[train]'"
        raise DataRejected(path, None, rule) from error
    problems = Problems(path, "row")
    try:
        with parquet.ParquetFile(path) as file:
            found = [name for name in file.schema_arrow.names if name in _COLUMNS]
            if not found:
                names = ", ".join(file.schema_arrow.names) or "none"
                raise DataRejected(path, None, f"has the columns {names}; {WANTED}")
            number = 0
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=found):
                for row in _rows(batch):
                    number += 1
                    try:
                        yield record_of(_value(row), number)
                    except RecordRejected as rejected:
                        problems.add(number, str(rejected))
    except OSError as error:
        raise DataRejected(path, None, f"cannot be read: {error.strerror or error}") from error
    except pyarrow.ArrowException as error:
        raise DataRejected(path, None, f"is not a readable Parquet file ({error})") from error
    problems.raise_if_any()


def _rows(batch: Any) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """Each row's columns; pyarrow checks UTF-8 only when a string is read, and for all at once."""
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass
    for index in range(batch.num_rows):
        try:
            yield batch.slice(index, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield error


def _value(row: dict[str, Any] | UnicodeDecodeError) -> dict[str, Any]:
    if isinstance(row, UnicodeDecodeError):
        raise RecordRejected("holds text that is not UTF-8") from row
    try:
        return {name: _text(value) for name, value in row.items() if value is not None}
    except UnicodeDecodeError as error:
        raise RecordRejected("holds text that is not UTF-8") from error


def _text(value: Any) -> Any:
    """Some writers store strings as plain bytes."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list):
        return [_text(item) for item in value]
    if isinstance(value, dict):
        return {name: _text(item) for name, item in value.items()}
    return value
