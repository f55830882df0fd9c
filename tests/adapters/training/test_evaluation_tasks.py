"""Tasks of an evaluation: what is read, and what is refused with its line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.adapters.training.errors import DataRejected, OptionRejected
from shoal.adapters.training.evaluation.extraction import RULES, normalised
from shoal.adapters.training.evaluation.reasoning import read_reasoning_task
from shoal.adapters.training.evaluation.scoring import grade
from shoal.adapters.training.evaluation.spec import TaskSpec
from shoal.adapters.training.evaluation.tasks import (
    AnswerItem,
    ChoiceItem,
    Prompt,
    Task,
    TextItem,
    read_task,
)

Write = Callable[..., Path]
GOOD = b'{"prompt": "a", "answer": "b"}'


def read(path: Path, **options: str) -> Task:
    return read_task(TaskSpec(str(path), options))


def lines(*values: object) -> list[str]:
    return [json.dumps(value) for value in values]


CHAT = [{"role": "user", "content": "q"}]


@pytest.mark.parametrize(
    ("value", "item"),
    [
        ({"prompt": "p", "answer": "a"}, AnswerItem(1, Prompt(text="p"), ("a",))),
        ({"prompt": "p", "answer": ["a", "b"]}, AnswerItem(1, Prompt(text="p"), ("a", "b"))),
        ({"prompt": "p", "completion": " a"}, AnswerItem(1, Prompt(text="p"), (" a",))),
        (
            {"messages": CHAT, "answer": "a"},
            AnswerItem(1, Prompt(messages=(("user", "q"),)), ("a",)),
        ),
        (
            {"messages": [*CHAT, {"role": "assistant", "content": "a"}]},
            AnswerItem(1, Prompt(messages=(("user", "q"),)), ("a",)),
        ),
        (
            {"prompt": "p", "choices": ["x", "y"], "answer": "y"},
            ChoiceItem(1, Prompt(text="p"), ("x", "y"), 1),
        ),
        (
            {"prompt": "p", "choices": ["x", "y"], "answer": 0},
            ChoiceItem(1, Prompt(text="p"), ("x", "y"), 0),
        ),
        ({"text": "t"}, TextItem(1, "t")),
    ],
)
def test_a_line_becomes_an_item(write_lines: Write, value: object, item: object) -> None:
    assert read(write_lines(*lines(value))).items == (item,)


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        (b"{", "is not JSON"),
        (b'{"text": "\xff"}', "is not JSON in UTF-8"),
        (b"[1]", "must be a JSON object"),
        (b"{}", "needs exactly one of"),
        (b'{"text": "a", "prompt": "b"}', "needs exactly one of"),
        (b'{"prompt": "a"}', '"answer" must be'),
        (b'{"prompt": " ", "answer": "b"}', '"prompt" must be a string'),
        (b'{"prompt": "a", "answer": ["b", 1]}', '"answer" must be'),
        (b'{"prompt": "a", "answer": "\\ud800"}', "surrogate"),
        (b'{"prompt": "a", "choices": ["b"], "answer": 0}', "at least two"),
        (b'{"prompt": "a", "choices": ["b", "b"], "answer": 0}', "twice"),
        (b'{"prompt": "a", "choices": ["b", ""], "answer": 0}', "not empty"),
        (b'{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "its index"),
        (b'{"prompt": "a", "choices": ["b", "c"], "answer": true}', "its index"),
        (b'{"messages": [], "answer": "b"}', '"messages" must be a list'),
        (b'{"messages": [{"role": "cat", "content": "a"}], "answer": "b"}', "role 'cat'"),
        (b'{"messages": [{"role": "system", "content": "a"}], "answer": "b"}', "end with the user"),
        (b'{"text": "a"}', "another kind than line 1"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(write_lines: Write, line: bytes, rule: str) -> None:
    with pytest.raises(DataRejected, match=rule) as refused:
        read(write_lines(GOOD, b"", line))
    assert refused.value.line == 3


def test_a_file_without_items_is_refused(write_lines: Write, tmp_path: Path) -> None:
    with pytest.raises(DataRejected, match="no items"):
        read(write_lines(b""))
    with pytest.raises(DataRejected, match="cannot be read"):
        read(tmp_path / "absent.jsonl")


def test_what_decides_a_score_decides_the_digest(write_lines: Write) -> None:
    def digest(line: bytes, **options: str) -> str:
        return read(write_lines(line), **options).digest

    known = digest(GOOD)
    assert digest(GOOD, name="other") == known
    assert digest(b'{"answer": "b", "prompt": "a", "note": 1}') == known
    changed = [
        digest(GOOD, max_tokens="3"),
        digest(GOOD, extract="first-line"),
        digest(b'{"prompt": "a", "answer": "c"}'),
        digest(b'{"messages": [{"role": "user", "content": "a"}], "answer": "b"}'),
    ]
    assert len({known, *changed}) == 1 + len(changed)


def test_a_spec_is_a_source_and_options(tmp_path: Path) -> None:
    spec = TaskSpec.parse("a/b.jsonl:limit=3,name=c")
    assert (spec.source, spec.options) == ("a/b.jsonl", {"limit": "3", "name": "c"})
    assert TaskSpec.parse("reasoning-gym:chain_sum") == TaskSpec("reasoning-gym:chain_sum")
    odd = tmp_path / "x:y=1"
    odd.touch()
    assert TaskSpec.parse(str(odd)) == TaskSpec(str(odd))
    with pytest.raises(OptionRejected, match="each key once"):
        TaskSpec.parse("a:b=1,b=2")


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"limt": "1"}, "no option 'limt'"),
        ({"limit": "0"}, "at least 1"),
        ({"extract": "guess"}, "must be one of"),
        ({"length": "4"}, "belongs to texts"),
    ],
)
def test_a_bad_option_is_refused(write_lines: Write, options: dict[str, str], rule: str) -> None:
    with pytest.raises(OptionRejected, match=rule):
        read(write_lines(GOOD), **options)


@pytest.mark.parametrize(
    ("rule", "text", "found"),
    [
        ("whole", " a b\n", "a b"),
        ("first-line", "\n\n a \nb", "a"),
        ("first-line", " ", ""),
        ("last-number", "2 and 1,234.50 euro", "1234.5"),
        ("last-number", "so -7.", "-7"),
        ("last-number", "none", ""),
        ("last-number", "the items 1,2,3", "3"),
        ("last-number", "from 3-5", "5"),
        ("last-number", "x = -5", "-5"),
        ("last-number", "12,345,678", "12345678"),
        ("last-number", "half: .50", "0.5"),
        ("last-number", "+7.00", "7"),
        ("last-number", "-0.0", "0"),
        ("answer-tag", "<answer>1</answer> x <answer> 2\n</answer>", "2"),
        ("answer-tag", " <answer>1", "<answer>1"),
    ],
)
def test_extraction(rule: str, text: str, found: str) -> None:
    assert RULES[rule](text) == found


def test_equal_answers_may_differ_in_white_space_alone(write_lines: Write) -> None:
    assert normalised("a\n  b ") == normalised("a b")
    task = read(write_lines(*lines({"prompt": "p", "answer": ["x y", "3"]})), extract="first-line")
    graded = [grade(task, 0, text) for text in ("x  y\nmore", "3", "X y", "3.")]
    assert graded == [1.0, 1.0, 0.0, 0.0]


def test_numbers_of_the_data_are_compared_as_numbers(write_lines: Write) -> None:
    task = read(
        write_lines(*lines({"prompt": "p", "answer": ["1,200", "2.50", "none"]})),
        extract="last-number",
    )
    texts = ("it is 1200.", "1,200", "so 2.5", "2.50", "3", "no number")
    assert [grade(task, 0, text) for text in texts] == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def test_an_answer_that_a_scorer_cannot_read_is_wrong() -> None:
    pytest.importorskip("reasoning_gym")
    task = read_reasoning_task(TaskSpec("reasoning-gym:prime_factorization", {"size": "2"}))
    item = task.items[0]
    assert isinstance(item, AnswerItem)
    assert grade(task, 0, "no idea") == 0.0
    assert grade(task, 0, item.answers[0]) == 1.0


def test_a_reasoning_task_is_graded_by_its_own_scorer() -> None:
    pytest.importorskip("reasoning_gym")

    def made(**options: str) -> Task:
        return read_reasoning_task(TaskSpec("reasoning-gym:chain_sum", {"size": "5", **options}))

    task = made()
    assert len(task.items) == 5
    assert made() == task
    assert made(seed="3").digest != task.digest
    assert len(made(limit="2").items) == 2
    item = task.items[0]
    assert isinstance(item, AnswerItem)
    right = item.answers[0]
    assert grade(task, 0, f"I think <answer>{right}</answer>") == 1.0
    assert grade(task, 0, f" {right}\n") == 1.0
    assert 0.0 < grade(task, 0, f"it is {right} for sure") < 1.0
    for spec, rule in ((":size=x", "refused"), ("_nothing", "not registered")):
        with pytest.raises(DataRejected, match=rule):
            read_reasoning_task(TaskSpec.parse("reasoning-gym:chain_sum" + spec))


def test_a_reasoning_task_leaves_everybodys_random_numbers_alone() -> None:
    pytest.importorskip("reasoning_gym")
    import random

    random.seed(7)
    expected: Any = random.Random(7).random()
    read_reasoning_task(TaskSpec("reasoning-gym:leg_counting", {"size": "3"}))
    assert random.random() == expected
