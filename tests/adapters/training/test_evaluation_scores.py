"""From answers to scores, files and tables, with a source that needs no model."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.adapters.training.errors import DataRejected, OptionRejected, RunDirectoryError
from shoal.adapters.training.evaluation.evaluating import Evaluation, evaluate
from shoal.adapters.training.evaluation.report import summaries, table
from shoal.adapters.training.evaluation.results import Results, Score
from shoal.adapters.training.evaluation.runs import AdapterFacts, adapter_facts, unique_names
from shoal.adapters.training.evaluation.scoring import (
    choice_values,
    exact_values,
    forgetting_values,
)
from shoal.adapters.training.evaluation.source import (
    BASE,
    Answer,
    Continuation,
    Divergence,
    Likelihood,
    PromptRejected,
    Question,
)
from shoal.adapters.training.evaluation.spec import TaskSpec
from shoal.adapters.training.evaluation.tasks import ChoiceItem, Prompt, Task, read_task


class Letters:
    """Answers with its adapter's name, likes the choices that begin with it, knows one divergence.

    A token is a character.
    """

    base_digest, dtype, max_length, max_scored = "d", "float32", 40, 40

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        if prompt.messages:
            raise PromptRejected("has no chat template")
        return self.encode_text(prompt.text)

    def encode_continuation(self, text: str) -> tuple[int, ...]:
        return self.encode_text(text)

    def encode_text(self, text: str) -> tuple[int, ...]:
        return tuple(map(ord, text))

    def generate(self, questions: Iterable[Question]) -> Iterator[Answer]:
        for question in reversed(list(questions)):  # any order
            self.asked.append(("exact", question.adapter))
            text = question.adapter
            yield Answer(question, self.encode_text(text), text, len(text) < question.max_tokens)

    def likelihoods(self, continuations: Iterable[Continuation]) -> Iterator[Likelihood]:
        for wanted in continuations:
            self.asked.append(("choice", wanted.adapter))
            likes = wanted.token_ids[0] == ord(wanted.adapter[0])
            yield Likelihood(wanted, (-1.0 if likes else -2.0) * len(wanted.token_ids))

    def divergences(
        self, adapters: Sequence[str], texts: Sequence[tuple[int, ...]]
    ) -> Iterator[Divergence]:
        for key, text in enumerate(texts):
            for adapter in adapters:
                self.asked.append(("forgetting", adapter))
                count = len(text) - 1
                extra = 0.0 if adapter == BASE else 0.5
                numbers = (3.0 + extra, 3.0, extra, 4.0)
                yield Divergence(adapter, key, count, *(count * number for number in numbers))


ADAPTERS = {"ann": "1" * 64, "bob": "2" * 64}


@pytest.fixture
def tasks(tmp_path: Path) -> list[Task]:
    """A task for each metric."""
    files = {
        "names": [
            {"prompt": "who", "answer": "ann"},
            {"prompt": "else", "answer": ["bob", "base"]},
        ],
        "first": [{"prompt": "p", "choices": ["ax", "b"], "answer": "ax"}],
        "prose": [{"text": "abcdefg"}],
    }
    made = []
    for name, lines in files.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        options = {"names": {"max_tokens": "4"}, "prose": {"length": "3"}}.get(name, {})
        made.append(read_task(TaskSpec(str(path), options)))
    return made


def values(evaluation: Evaluation, name: str) -> dict[str, dict[str, float]]:
    return {s.task: dict(s.values) for s in evaluation.scores if s.adapter == name}


def test_every_adapter_and_the_base_are_scored_on_every_task(tasks: list[Task]) -> None:
    found = evaluate(Letters(), ADAPTERS, tasks)
    assert [score.adapter for score in found.scores] == [
        n for n in (BASE, *ADAPTERS) for _ in "123"
    ]
    ann, bob, base = (values(found, name) for name in ("ann", "bob", BASE))
    assert ann["names"]["accuracy"] == 0.5
    assert base["names"]["accuracy"] == 0.5
    assert base["names"]["unfinished"] == 1.0
    # By their sum -2 and -2: the first; by bytes -1 and -2.
    assert (ann["first"]["accuracy"], ann["first"]["accuracy_norm"]) == (1.0, 1.0)
    assert (bob["first"]["accuracy"], bob["first"]["accuracy_norm"]) == (0.0, 0.0)
    # Windows of 3, 3 and 1 tokens, of which the last predicts nothing.
    assert [s.items for s in found.scores if s.task == "prose"] == [4, 4, 4]
    assert base["prose"]["cross_entropy"] == base["prose"]["entropy"] == 3.0
    assert ann["prose"]["kl"] == 0.5
    short = read_task(TaskSpec(str(tasks[2].source), {"length": "3", "limit": "1"}))
    assert [s.items for s in evaluate(Letters(), {}, [short], metrics=["forgetting"]).scores] == [2]
    assert ann["prose"]["perplexity"] == pytest.approx(math.exp(4.0))


def test_what_is_in_the_results_is_not_asked_again(tasks: list[Task], tmp_path: Path) -> None:
    path = tmp_path / "out" / "results.jsonl"
    first = evaluate(Letters(), {"ann": ADAPTERS["ann"]}, tasks, results=Results(path))
    source = Letters()
    # The same adapter under another name, and a new one.
    renamed = {"anna": ADAPTERS["ann"], "bob": ADAPTERS["bob"]}
    second = evaluate(source, renamed, tasks, results=Results(path))
    assert {name for _, name in source.asked} == {"bob"}
    assert values(second, "anna") == values(first, "ann")
    assert evaluate(Letters(), renamed, tasks, results=Results(path)).throughput == ()
    changed = [replace(task, digest="0" * 64) for task in tasks]
    source = Letters()
    evaluate(source, {}, changed, results=Results(path))
    assert {name for _, name in source.asked} == {BASE}


def test_another_template_or_tokenizer_is_measured_anew(tasks: list[Task], tmp_path: Path) -> None:
    """The digest of a base is of its weights: what prompts become is not in it."""

    class Shifted(Letters):
        def encode(self, prompt: Prompt) -> tuple[int, ...]:
            return (0, *super().encode(prompt))

    path = tmp_path / "results.jsonl"
    evaluate(Letters(), {}, tasks, results=Results(path))
    source = Shifted()
    evaluate(source, {}, tasks, results=Results(path))
    assert {metric for metric, _ in source.asked} == {"exact", "choice"}  # texts are the same


def test_scores_are_on_disk_as_soon_as_they_are_known(tasks: list[Task], tmp_path: Path) -> None:
    class Dies(Letters):
        def likelihoods(self, continuations: Iterable[Continuation]) -> Iterator[Likelihood]:
            raise KeyboardInterrupt

    path = tmp_path / "results.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate(Dies(), ADAPTERS, tasks, results=Results(path))
    assert len(Results(path)) == 3
    with path.open("a") as file:
        file.write('{"base_dig')
    source = Letters()
    evaluate(source, ADAPTERS, tasks, results=Results(path))
    assert "exact" not in {metric for metric, _ in source.asked}
    assert len(Results(path)) == 9
    path.write_text("{}\n")
    with pytest.raises(RunDirectoryError, match="line 1"):
        Results(path)


def test_what_cannot_be_evaluated_is_refused_before_anything_is_asked(
    tasks: list[Task], tmp_path: Path
) -> None:
    source = Letters()
    with pytest.raises(OptionRejected, match="no task has choices"):
        evaluate(source, {}, tasks[:1], metrics=["exact", "choice"])
    with pytest.raises(OptionRejected, match="must be among"):
        evaluate(source, {}, tasks, metrics=["accuracy"])
    with pytest.raises(OptionRejected, match="name="):
        evaluate(source, {}, [tasks[0], replace(tasks[0])], metrics=["exact"])
    with pytest.raises(OptionRejected, match="own row"):
        evaluate(source, {BASE: ""}, tasks)
    bad = {
        '{"messages": [{"role": "user", "content": "q"}], "answer": "a"}': "no chat template",
        json.dumps({"prompt": "a" * 40, "answer": "a"}): "40 tokens",
        json.dumps({"prompt": "a" * 39, "choices": ["aa", "b"], "answer": 0}): "41 tokens",
        '{"text": "a"}': "fewer than two",
    }
    for line, rule in bad.items():
        path = tmp_path / "bad.jsonl"
        path.write_text(line + "\n")
        options = {"length": "4"} if "text" in line else {}
        options |= {"max_tokens": "8"} if '"answer": "a"' in line else {}
        with pytest.raises(DataRejected, match=f"line 1: .*{rule}"):
            evaluate(source, ADAPTERS, [*tasks, read_task(TaskSpec(str(path), options))])
    path.write_text('{"prompt": "a", "answer": "a"}\n')
    long = read_task(TaskSpec(str(path), {"max_tokens": "40"}))
    with pytest.raises(OptionRejected, match="40 of bad: must be below 40"):
        evaluate(source, ADAPTERS, [*tasks, long])
    assert source.asked == []


def test_a_window_of_one_token_has_nothing_to_compare(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("abcdefghi")
    task = read_task(TaskSpec(str(tmp_path / "t.txt"), {"length": "4"}))
    source = Letters()
    [score] = evaluate(source, {}, [task], metrics=["forgetting"]).scores
    assert source.asked == [("forgetting", BASE)] * 2
    assert score.items == 6  # tokens that have one before them in their window


def test_the_numbers_of_a_metric() -> None:
    exact = exact_values([1.0, 0.5, 0.0, 1.0], [True, True, False, True])
    assert exact["accuracy"] == 0.5
    assert exact["score"] == 0.625
    assert exact["unfinished"] == 0.25
    assert exact["stderr"] == pytest.approx(math.sqrt(0.25 / 3))  # n - 1 in the variance
    item = ChoiceItem(1, Prompt(text="p"), ("long one", "x"), 0)
    choice = choice_values([item], [[-4.0, -1.0]], [[8, 1]])
    assert (choice["accuracy"], choice["accuracy_norm"]) == (0.0, 1.0)
    parts = [Divergence("a", 0, 3, 9.0, 6.0, 3.0, 12.0), Divergence("a", 1, 1, 2.0, 1.0, 1.0, 0.0)]
    text = forgetting_values(parts)  # over positions, not over texts
    assert (text["cross_entropy"], text["entropy"], text["kl"], text["loss"]) == (2.75, 1.75, 1, 3)


def test_the_table_has_a_row_for_each_adapter(tasks: list[Task]) -> None:
    found = evaluate(Letters(), ADAPTERS, tasks)
    facts = {"ann": AdapterFacts("lora-xs", 8, 13440, 135123, 61.5, 0.4, 300 << 20)}
    lines = table(found, facts).splitlines()
    assert lines[0].count("|") == lines[2].count("|") == lines[4].count("|")
    assert lines[2].startswith("| base |")
    assert "| ann | lora-xs | 8 | 13,440 | 135,123 | 61.5 | 300 | 50.0 ± 50.0 |" in lines[3]
    assert "0.5000" in lines[3]
    ann = summaries(found.scores)[1]
    assert (ann.adapter, ann.accuracy, ann.kl, ann.cross_entropy) == ("ann", 0.75, 0.5, 3.5)


def test_names_are_the_shortest_that_tell_adapters_apart(tmp_path: Path) -> None:
    def named(*paths: str) -> list[str]:
        return unique_names([tmp_path / path for path in paths], "base")

    assert named("a/x", "b/y") == ["x", "y"]
    assert named("a/x", "b/x") == ["a/x", "b/x"]
    assert named("a/base") == ["a/base"]
    assert named() == []
    with pytest.raises(ValueError, match="twice"):
        named("a/x", "a/x")


def test_facts_come_from_the_run_directory(lab: object, tmp_path: Path) -> None:
    lab.train("run")  # type: ignore[attr-defined]
    run = tmp_path / "run"
    facts = adapter_facts(run)
    assert (facts.method, facts.rank) == ("lora-xs", 4)
    assert facts.parameters == 4 * 4 * 7 * 2
    assert facts.train_seconds is not None
    assert facts.peak_bytes is not None
    assert facts.train_seconds > 0
    assert facts.peak_bytes > 1 << 20
    assert facts.file_bytes == sum(path.stat().st_size for path in run.glob("adapter_*"))
    (run / "training.json").unlink()
    (run / "metrics.jsonl").unlink()
    bare = adapter_facts(run)
    # Counted in the file, whose basis probes were not trained.
    assert (bare.parameters, bare.train_seconds) == (facts.parameters, None)
    steps = [{"step": n, "seconds": seconds} for n, seconds in enumerate((1.0, 0.5, 0.25))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    timed = adapter_facts(run)
    assert (timed.train_seconds, timed.step_seconds) == (1.75, 0.5)
    # What is damaged is not known, and stops nothing.
    for name in ("metrics.jsonl", "training.json"):
        (run / name).write_text("{torn\n")
    assert adapter_facts(run) == bare


def test_a_score_survives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    score = Score("d", "float32", "a", "e", "t", "f", "exact", 3, {"accuracy": 1 / 3})
    Results(path).append(score)
    assert Results(path)[score.key] == score
