"""JSONL, Parquet and generated tasks as data, and what is said when they cannot be used."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.adapters.training.data import Record, load_examples, read_records
from shoal.adapters.training.errors import DataRejected

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

WriteLines = Callable[..., Path]
CHAT = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "xyz"}]


def write_parquet(path: Path, rows: list[dict[str, Any]], schema: Any = None) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path)
    return path


def test_parquet_and_jsonl_of_the_same_records_are_the_same_data(
    tokenizer: Any, write_lines: WriteLines, tmp_path: Path
) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": CHAT, "prompt": None, "completion": None},
        {"messages": None, "prompt": "2+2=", "completion": "4"},
    ]
    present = [{key: value for key, value in row.items() if value is not None} for row in rows]
    lines = write_lines(*map(json.dumps, present))
    table = write_parquet(tmp_path / "data.parquet", rows)

    assert read_records(table) == read_records(lines)
    assert load_examples(table, tokenizer, 50) == load_examples(lines, tokenizer, 50)


def test_parquet_is_told_by_its_content_not_its_name(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "data.jsonl", [{"prompt": "a", "completion": "b", "id": 1}])
    assert read_records(path) == [Record(1, prompt="a", completion="b")]


def test_a_parquet_row_that_breaks_a_rule_is_named(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": text} for text in ("b", "", "c", None)]
    path = write_parquet(tmp_path / "data.parquet", rows)

    with pytest.raises(DataRejected, match='row 2: "completion" must be a string') as caught:
        read_records(path)
    assert [number for number, _ in caught.value.others] == [4]


@pytest.mark.parametrize("kind", ["string", "binary"])
def test_a_parquet_row_that_is_not_utf8_is_named(kind: str, tmp_path: Path) -> None:
    texts = pyarrow.array([b"good", b"\xff\xfe", b"fine"], pyarrow.binary())
    if kind == "string":  # without a check, as some writers do
        texts = pyarrow.Array.from_buffers(pyarrow.string(), 3, texts.buffers())
    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.table({"prompt": texts, "completion": ["x"] * 3}), path)

    with pytest.raises(DataRejected, match="row 2: holds text that is not UTF-8") as caught:
        read_records(path)
    assert not caught.value.others


def test_parquet_with_other_columns_or_damage_is_refused(tmp_path: Path) -> None:
    other = write_parquet(tmp_path / "other.parquet", [{"question": "a", "answer": "b"}])
    with pytest.raises(DataRejected, match='columns question, answer; needs either "messages"'):
        read_records(other)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(other.read_bytes()[:-30])
    with pytest.raises(DataRejected, match="not a readable Parquet file"):
        read_records(broken)
    named = tmp_path / "named.parquet"
    named.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataRejected, match="not a readable Parquet file"):
        read_records(named)
    empty = write_parquet(
        tmp_path / "empty.parquet",
        [],
        pyarrow.schema([("prompt", pyarrow.string()), ("completion", pyarrow.string())]),
    )
    with pytest.raises(DataRejected, match="no records"):
        read_records(empty)


def test_the_first_ten_problems_are_listed_and_the_rest_counted(write_lines: WriteLines) -> None:
    fine = json.dumps({"messages": CHAT})
    path = write_lines(fine, *["{}"] * 9, b'{"prompt": "\xff"}', "", *["[]"] * 5)

    with pytest.raises(DataRejected) as caught:
        read_records(path)
    error = caught.value
    assert (error.line, error.unlisted) == (2, 5)
    assert [number for number, _ in error.others] == [3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert "byte 13 of the line is 0xff" in error.others[-1][1]
    assert len(str(error).splitlines()) == 11
    assert str(error).endswith("and 5 more")


def test_a_byte_order_mark_is_skipped_and_half_a_character_is_refused(
    write_lines: WriteLines,
) -> None:
    fine = json.dumps({"messages": CHAT}).encode()
    assert len(read_records(write_lines(b"\xef\xbb\xbf" + fine, fine))) == 2
    with pytest.raises(DataRejected, match=r"line 1: .* unpaired surrogate"):
        read_records(write_lines(r'{"prompt": "\ud800", "completion": "b"}'))


def test_records_that_do_not_fit_are_cut_or_refused_as_asked(
    tokenizer: Any, write_lines: WriteLines
) -> None:
    long = '{"prompt": "abcd", "completion": "efgh"}'
    path = write_lines('{"prompt": "a", "completion": "b"}', long, long)

    assert [len(e.input_ids) for e in load_examples(path, tokenizer, 6)] == [3, 6, 6]
    with pytest.raises(
        DataRejected, match="line 2: has 9 tokens, more than max-length 6"
    ) as caught:
        load_examples(path, tokenizer, 6, too_long="refuse")
    assert [number for number, _ in caught.value.others] == [3]


def test_a_generated_task_is_data(tokenizer: Any) -> None:
    pytest.importorskip("reasoning_gym")
    before = random.getstate()
    spec = Path("reasoning-gym:spell_backward:size=5,seed=3,min_word_len=4")
    records = read_records(spec)

    assert random.getstate() == before
    assert records == read_records(spec) != read_records(Path(str(spec).replace("=3", "=4")))
    assert len(records) == 5
    for record in records:
        (asker, question), (answerer, answer) = record.messages
        assert (asker, answerer) == ("user", "assistant")
        assert len(answer) >= 4
        assert question.endswith(answer[::-1])
    assert len(load_examples(spec, tokenizer, 200)) == 5


@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        ("nonsense", "Dataset 'nonsense' not registered"),
        ("", "names no task"),
        ("spell_backward:size", "has the option 'size'"),
        ("spell_backward:speed=1", "unexpected keyword argument 'speed'"),
        ("spell_backward:min_word_len=0", "min_word_len must be"),
    ],
)
def test_a_task_that_cannot_be_made_is_refused(spec: str, rule: str) -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(DataRejected, match=rule):
        read_records(Path(f"reasoning-gym:{spec}"))


def test_what_is_not_installed_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "data.parquet", [{"prompt": "a", "completion": "b"}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(DataRejected, match=r"pip install 'shoal\[train\]'"):
        read_records(path)
    with pytest.raises(DataRejected, match=r"pip install 'shoal\[tasks\]'"):
        read_records(Path("reasoning-gym:spell_backward"))
