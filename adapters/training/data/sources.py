"""Which reader a source of data belongs to."""

from collections.abc import Iterable
from pathlib import Path

from shoal.adapters.training.data.jsonl import read_jsonl
from shoal.adapters.training.data.parquet import MAGIC, read_parquet
from shoal.adapters.training.data.records import Record
from shoal.adapters.training.data.tasks import PREFIX, read_task
from shoal.adapters.training.errors import DataRejected


def read_records(path: Path) -> list[Record]:
    """Read and check all records of a JSONL or Parquet file or a generated task.

    Args:
        path: the file (Parquet is told by its first bytes), or ``reasoning-gym:NAME:key=value,…``.

    Raises:
        DataRejected: it cannot be read, is empty, or records break a rule: the first ten are named.
    """
    records = list(_reader(path))
    if not records:
        raise DataRejected(path, None, "holds no records; one JSON object a line is expected")
    return records


def place_of(path: Path) -> str:
    """What a record's number counts in this source: ``line``, ``row`` or ``item``."""
    if str(path).startswith(PREFIX):
        return "item"
    return "row" if _is_parquet(path) else "line"


def _reader(path: Path) -> Iterable[Record]:
    if str(path).startswith(PREFIX):
        return read_task(path)
    return read_parquet(path) if _is_parquet(path) else read_jsonl(path)


def _is_parquet(path: Path) -> bool:
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DataRejected(path, None, "is no regular file: it is read more than once")
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC or path.suffix == ".parquet"
    except OSError as error:
        raise DataRejected(path, None, f"cannot be read: {error.strerror}") from error
