"""Records, masks and batches."""

import json
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.adapters.training.data import Example, collate, load_examples, order_of
from shoal.adapters.training.errors import DataRejected

WriteLines = Callable[..., Path]


def chat(*turns: tuple[str, str]) -> str:
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]})


def supervised_runs(example: Example, tokenizer: Any) -> list[str]:
    """The supervised tokens, decoded, one string per unbroken run."""
    runs: list[list[int]] = []
    before = False
    for token, learnt in zip(example.input_ids, example.supervised, strict=True):
        if learnt and not before:
            runs.append([])
        if learnt:
            runs[-1].append(token)
        before = learnt
    return [tokenizer.decode(run) for run in runs]


def test_a_chat_learns_the_answer_and_its_end_token_only(
    tokenizer: Any, write_lines: WriteLines
) -> None:
    path = write_lines(chat(("system", "be brief"), ("user", "who?"), ("assistant", "me")))
    [example] = load_examples(path, tokenizer, 100)

    assert supervised_runs(example, tokenizer) == ["me<|im_end|>"]
    # Everything before the first supervised token is the prompt that a server would be sent.
    prompt = tokenizer.apply_chat_template(
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "who?"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert list(example.input_ids[: example.supervised.index(True)]) == prompt


def test_every_assistant_turn_is_learnt(tokenizer: Any, write_lines: WriteLines) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    [example] = load_examples(write_lines(chat(*turns)), tokenizer, 100)

    assert supervised_runs(example, tokenizer) == ["b<|im_end|>", "d<|im_end|>"]


def test_a_completion_is_learnt_from_its_first_token_to_the_end_token(
    tokenizer: Any, write_lines: WriteLines
) -> None:
    path = write_lines('{"prompt": "2+2=", "completion": " 4", "id": 7}')
    [example] = load_examples(path, tokenizer, 100)

    assert supervised_runs(example, tokenizer) == [" 4<|im_end|>"]
    assert tokenizer.decode(example.input_ids) == "2+2= 4<|im_end|>"


def test_a_record_that_is_too_long_loses_its_end(tokenizer: Any, write_lines: WriteLines) -> None:
    path = write_lines('{"prompt": "abcd", "completion": "efgh"}')
    [example] = load_examples(path, tokenizer, 6)

    assert tokenizer.decode(example.input_ids) == "abcdef"
    assert supervised_runs(example, tokenizer) == ["ef"]


def test_a_record_without_anything_to_learn_within_the_limit_is_refused(
    tokenizer: Any, write_lines: WriteLines
) -> None:
    path = write_lines("", '{"prompt": "abcd", "completion": "efgh"}')

    with pytest.raises(DataRejected, match=r"line 2: has 9 tokens and none .* max-length 4"):
        load_examples(path, tokenizer, 4)


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("{", "not JSON"),
        (b'{"prompt": "\xff"}', "not JSON in UTF-8"),
        ("[1]", "must be a JSON object"),
        ("{}", 'needs either "messages"'),
        ('{"messages": [], "prompt": "a"}', 'needs either "messages"'),
        ('{"prompt": "a"}', '"completion" must be a string'),
        ('{"prompt": "a", "completion": ""}', '"completion" must be a string that is not empty'),
        ('{"prompt": 1, "completion": "b"}', '"prompt" must be a string'),
        ('{"messages": []}', "must be a list that is not empty"),
        ('{"messages": "hi"}', "must be a list"),
        ('{"messages": ["hi"]}', r'"messages"\[0\] must be an object'),
        (chat(("robot", "a")), "has role 'robot'"),
        (chat(("user", " "), ("assistant", "b")), r'"messages"\[0\] needs a content'),
        (chat(("user", "a")), "no assistant turn"),
        (chat(("assistant", "a")), "must not begin with the assistant"),
    ],
)
def test_a_bad_record_is_refused_with_its_line_and_rule(
    line: str | bytes, rule: str, tokenizer: Any, write_lines: WriteLines
) -> None:
    path = write_lines(chat(("user", "fine"), ("assistant", "fine")), line)

    with pytest.raises(DataRejected, match=rule) as caught:
        load_examples(path, tokenizer, 100)
    assert caught.value.line == 2
    assert str(path) in str(caught.value)


def test_files_without_records_are_refused(
    tokenizer: Any, write_lines: WriteLines, tmp_path: Path
) -> None:
    with pytest.raises(DataRejected, match="no records"):
        load_examples(write_lines(" "), tokenizer, 100)
    with pytest.raises(DataRejected, match="cannot be read"):
        load_examples(tmp_path / "absent.jsonl", tokenizer, 100)


def test_a_chat_for_a_base_without_a_template_is_refused(
    base: Path, write_lines: WriteLines
) -> None:
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(base)
    plain.chat_template = None
    with pytest.raises(DataRejected, match="no chat template"):
        load_examples(write_lines(chat(("user", "a"), ("assistant", "b"))), plain, 100)


def test_a_template_that_rewrites_earlier_turns_is_refused(
    base: Path, write_lines: WriteLines
) -> None:
    from transformers import AutoTokenizer

    rewriting = AutoTokenizer.from_pretrained(base)
    rewriting.chat_template = "{{ messages | length }}{{ messages[-1]['content'] }}"
    with pytest.raises(DataRejected, match="as an addition"):
        load_examples(write_lines(chat(("user", "a"), ("assistant", "b"))), rewriting, 100)


def test_a_template_that_writes_the_date_gives_the_same_tokens_every_day(
    base: Path, write_lines: WriteLines
) -> None:
    from transformers import AutoTokenizer

    dated = AutoTokenizer.from_pretrained(base)
    dated.chat_template = "{{ strftime_now('%d %b %Y') }}|" + dated.chat_template
    [example] = load_examples(write_lines(chat(("user", "a"), ("assistant", "b"))), dated, 100)
    assert dated.decode(example.input_ids).startswith("26 Jul 2024|")


@pytest.mark.parametrize("template", ["{{ 1 + 'a' }}", "{{ messages[9].content | int(0) + x }}"])
def test_a_template_that_trips_over_a_chat_is_a_bad_record(
    template: str, base: Path, write_lines: WriteLines
) -> None:
    from transformers import AutoTokenizer

    tripping = AutoTokenizer.from_pretrained(base)
    tripping.chat_template = template
    with pytest.raises(DataRejected, match="line 1: the chat template refuses it"):
        load_examples(write_lines(chat(("user", "a"), ("assistant", "b"))), tripping, 100)


def test_a_pipe_is_refused_since_data_is_read_twice(tokenizer: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataRejected, match="no regular file"):
        load_examples(tmp_path / "pipe", tokenizer, 100)


def test_the_order_is_a_new_permutation_every_epoch_decided_by_the_seed() -> None:
    first, again, other = (list(islice(order_of(7, seed), 21)) for seed in (3, 3, 4))

    assert first == again != other
    epochs = [first[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_batches_are_padded_on_the_right_and_padding_is_not_learnt() -> None:
    long = Example((5, 6, 7), (False, True, True))
    short = Example((8, 9), (True, True))
    batch = collate([long, short], pad_id=0, device=torch.device("cpu"))

    assert batch.input_ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.supervised.tolist() == [[False, True, True], [True, True, False]]
    assert batch.num_tokens == 5
    assert batch.num_supervised == 3  # nothing predicts the first token of the second row
