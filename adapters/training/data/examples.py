"""Reads and tokenises a whole data set, and decides what happens to records that are too long."""

import logging
from pathlib import Path
from typing import Any, Literal

from shoal.adapters.training.data.encoding import parts_of, tokenised
from shoal.adapters.training.data.example import Example
from shoal.adapters.training.data.records import Problems, RecordRejected
from shoal.adapters.training.data.sources import place_of, read_records

log = logging.getLogger(__name__)

TooLong = Literal["cut", "refuse"]
# What may be done with a record longer than the limit: it loses its end, or the data is refused.
TOO_LONG: tuple[TooLong, ...] = ("cut", "refuse")

# Records that take seconds to tokenise (half a millisecond each): whoever waits is told.
_MANY = 10_000


def load_examples(
    path: Path, tokenizer: Any, max_length: int, *, too_long: TooLong = "cut"
) -> list[Example]:
    """Read a source of data and tokenise every record.

    Args:
        path: a JSONL or Parquet file, or a task; see ``read_records``.
        tokenizer: a transformers tokenizer.
        max_length: tokens kept of a record.
        too_long: ``cut``: a longer record loses its end, and one that would lose everything
            supervised is refused; ``refuse``: every longer record is refused.

    Raises:
        DataRejected: records break a rule, or do not fit as said: the first ten are named.
    """
    examples = []
    num_cut = 0
    records = read_records(path)
    if len(records) >= _MANY:
        log.info("tokenising records=%d path=%s", len(records), path)
    problems = Problems(path, place_of(path))
    parts = []
    for record in records:
        try:
            parts.append(parts_of(record, tokenizer))
        except RecordRejected as rejected:
            problems.add(record.line, str(rejected))
    problems.raise_if_any()
    if tokenizer.eos_token_id is None and any(not record.messages for record in records):
        log.warning(
            "the base has no end token: completions are learnt without an end path=%s", path
        )
    for record, whole in zip(records, tokenised(parts, tokenizer), strict=True):
        try:
            examples.append(_fitted(whole, max_length, too_long))
            num_cut += len(whole.input_ids) > max_length
        except RecordRejected as rejected:
            problems.add(record.line, str(rejected))
    problems.raise_if_any()
    if num_cut:
        log.warning("cut records=%d max_length=%d path=%s", num_cut, max_length, path)
    return examples


def _fitted(whole: Example, max_length: int, too_long: TooLong) -> Example:
    length = len(whole.input_ids)
    if too_long == "refuse" and length > max_length:
        raise RecordRejected(f"has {length} tokens, more than max-length {max_length}")
    example = Example(whole.input_ids[:max_length], whole.supervised[:max_length])
    if not any(example.supervised[1:]):
        raise RecordRejected(
            f"has {length} tokens and none to learn within max-length {max_length}"
        )
    return example
