"""``evaluate``: adapters x tasks -> scores, through any ``AnswerSource``.

It owns what is asked, in which order, and when a score is complete. Everything asked of one metric
is one stream of questions, adapter after adapter, so that a source which runs many rows at once
always has enough of them, and they use different adapters.
"""

import hashlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from shoal.adapters.training.errors import DataRejected, OptionRejected
from shoal.adapters.training.evaluation.results import Key, Results, Score
from shoal.adapters.training.evaluation.scoring import (
    Values,
    choice_values,
    exact_values,
    forgetting_values,
    grade,
)
from shoal.adapters.training.evaluation.source import (
    BASE,
    AnswerSource,
    Continuation,
    Divergence,
    PromptRejected,
    Question,
)
from shoal.adapters.training.evaluation.tasks import (
    METRICS,
    AnswerItem,
    ChoiceItem,
    Prompt,
    Task,
    TextItem,
)

# (what is being done, how much of it is done, how much there is)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Graded:
    """One generated answer, for whoever keeps them."""

    adapter: str
    task: str
    line: int
    text: str
    grade: float


@dataclass(frozen=True, slots=True)
class Throughput:
    """What one metric took.

    Attributes:
        items: answers, choices, or texts, of all adapters together.
        tokens: generated for answers; scored for choices and texts.
        seconds: of the wall clock.
    """

    metric: str
    items: int
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """``scores`` of every adapter on every task, old ones too; ``throughput`` of what was run."""

    scores: tuple[Score, ...]
    throughput: tuple[Throughput, ...]


@dataclass(slots=True)
class _Count:
    """What a metric has done so far."""

    total: int
    items: int = 0
    tokens: int = 0
    began: float = field(default_factory=time.perf_counter)


def evaluate(
    source: AnswerSource,
    adapters: Mapping[str, str],
    tasks: Sequence[Task],
    *,
    metrics: Collection[str] = METRICS,
    results: Results | None = None,
    on_answer: Callable[[Graded], None] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score every adapter, and the base first of all, on every task.

    Args:
        adapters: names that ``source`` knows -> digests.
        metrics: ``exact`` scores tasks with answers, ``choice`` those with choices, ``forgetting``
            texts; others of the tasks are left out.
        results: holds what need not be measured again, and gets what was measured.
        on_answer: told of every generated answer.

    Raises:
        OptionRejected: a metric without a task, two tasks of one name, an adapter named ``base``.
        DataRejected: a prompt that the base cannot be asked; names the line. Nothing was measured.
    """
    results = Results() if results is None else results
    if BASE in adapters:
        raise OptionRejected("adapters", BASE, "is the name of the base's own row")
    names = {BASE: "", **adapters}
    _check(tasks, metrics)
    asked = [task for task in tasks if task.metric in metrics]
    runs: list[_Run] = [_RUNS[metric](source, on_answer) for metric in METRICS if metric in metrics]
    for run in runs:
        for task in asked:
            if task.metric == run.metric:
                run.add(task)

    # The tokens too decide a score: a base's files do not tell its tokenizer and chat template.
    digests = {task.name: run.digest(task) for run in runs for task in run.tasks}

    def key(task: Task, adapter: str) -> Key:
        digest = names[adapter]
        return Key(source.base_digest, source.dtype, digest, digests[task.name], task.metric)

    throughput = []
    for run in runs:
        todo = [
            (task, [name for name in names if key(task, name) not in results]) for task in run.tasks
        ]
        count = _Count(sum(run.size(task) * len(missing) for task, missing in todo))
        if not count.total:
            continue

        def tell(count: _Count = count, metric: str = run.metric) -> None:
            if progress is not None:
                progress(metric, count.items, count.total)

        tell()
        for task, adapter, items, values in run.scores(todo, count, tell):
            where = key(task, adapter)
            results.append(
                Score(
                    where.base_digest,
                    where.dtype,
                    adapter,
                    where.digest,
                    task.name,
                    where.task_digest,
                    task.metric,
                    items,
                    values,
                )
            )
        seconds = time.perf_counter() - count.began
        throughput.append(Throughput(run.metric, count.items, count.tokens, seconds))
    scores = tuple(
        replace(results[key(task, name)], adapter=name, task=task.name)
        for name in names
        for task in asked
    )
    return Evaluation(scores, tuple(throughput))


def _check(tasks: Sequence[Task], metrics: Collection[str]) -> None:
    for metric in metrics:
        if metric not in METRICS:
            raise OptionRejected("metrics", metric, f"must be among {', '.join(METRICS)}")
        if not any(task.metric == metric for task in tasks):
            wants = {"exact": "answers", "choice": "choices", "forgetting": "texts"}[metric]
            raise OptionRejected("metrics", metric, f"no task has {wants}")
    seen: dict[str, Task] = {}
    for task in tasks:
        if seen.setdefault(task.name, task) is not task:
            rule = "two tasks have this name; give one of them another with :name=…"
            raise OptionRejected("tasks", task.name, rule)


_Todo = Sequence[tuple[Task, Sequence[str]]]
_Done = Iterator[tuple[Task, str, int, Values]]


class _Run:
    """One metric: the tasks it scores, encoded and checked before anything is asked."""

    metric = ""

    def __init__(self, source: AnswerSource, on_answer: Callable[[Graded], None] | None) -> None:
        self.source = source
        self.on_answer = on_answer
        self.tasks: list[Task] = []

    def add(self, task: Task) -> None:
        """Encode a task, or DataRejected."""
        raise NotImplementedError

    def size(self, task: Task) -> int:
        """Items of a task, for one adapter."""
        return len(task.items)

    def tokens(self, task: Task) -> object:
        """All that is put to the model, as token ids."""
        raise NotImplementedError

    def digest(self, task: Task) -> str:
        """sha256 over everything that decides a score of an added task."""
        whole = f"{task.digest} {self.tokens(task)!r}"
        return hashlib.sha256(whole.encode()).hexdigest()

    def scores(self, todo: _Todo, count: _Count, tell: Callable[[], None]) -> _Done:
        """Task, adapter, items and values as they become known."""
        raise NotImplementedError

    def _encode(self, task: Task, line: int, prompt: Prompt) -> tuple[int, ...]:
        try:
            ids = self.source.encode(prompt)
        except PromptRejected as refused:
            raise DataRejected(task.source, line, str(refused)) from refused
        if not ids:
            raise DataRejected(task.source, line, "has a prompt without tokens")
        return ids


class _Exact(_Run):
    metric = "exact"

    def __init__(self, source: AnswerSource, on_answer: Callable[[Graded], None] | None) -> None:
        super().__init__(source, on_answer)
        self._prompts: dict[str, list[tuple[int, ...]]] = {}

    def add(self, task: Task) -> None:
        self.tasks.append(task)
        prompts = self._prompts[task.name] = []
        most = self.source.max_length - task.max_tokens
        if most < 1:
            rule = f"must be below {self.source.max_length}, the tokens that the model takes"
            raise OptionRejected("max_tokens", f"{task.max_tokens} of {task.name}", rule)
        for item in task.items:
            assert isinstance(item, AnswerItem)
            ids = self._encode(task, item.line, item.prompt)
            if len(ids) > most:
                rule = f"has {len(ids)} tokens; with {task.max_tokens} to generate at most {most}"
                raise DataRejected(task.source, item.line, f"{rule} fit the model")
            prompts.append(ids)

    def tokens(self, task: Task) -> object:
        return self._prompts[task.name]

    def scores(self, todo: _Todo, count: _Count, tell: Callable[[], None]) -> _Done:
        plan = [
            (task, adapter, index)
            for task, adapters in todo
            for adapter in adapters
            for index in range(len(task.items))
        ]
        grades: dict[tuple[str, str], dict[int, tuple[float, bool]]] = {}
        questions = (
            Question(adapter, key, self._prompts[task.name][index], task.max_tokens)
            for key, (task, adapter, index) in enumerate(plan)
        )
        for answer in self.source.generate(questions):
            task, adapter, index = plan[answer.question.key]
            value = grade(task, index, answer.text)
            if self.on_answer is not None:
                line = task.items[index].line
                self.on_answer(Graded(adapter, task.name, line, answer.text, value))
            count.items += 1
            count.tokens += len(answer.token_ids)
            tell()
            known = grades.setdefault((task.name, adapter), {})
            known[index] = value, answer.finished
            if len(known) == len(task.items):
                values = exact_values(
                    [v for v, _ in known.values()], [d for _, d in known.values()]
                )
                yield task, adapter, len(known), values


class _Choice(_Run):
    metric = "choice"

    def __init__(self, source: AnswerSource, on_answer: Callable[[Graded], None] | None) -> None:
        super().__init__(source, on_answer)
        # Of each task, of each item: the prompt and its choices.
        self._items: dict[str, list[tuple[tuple[int, ...], list[tuple[int, ...]]]]] = {}

    def add(self, task: Task) -> None:
        self.tasks.append(task)
        encoded = self._items[task.name] = []
        for item in task.items:
            assert isinstance(item, ChoiceItem)
            prompt = self._encode(task, item.line, item.prompt)
            choices = [self.source.encode_continuation(choice) for choice in item.choices]
            longest = len(prompt) + max(map(len, choices))
            if not all(choices):
                raise DataRejected(task.source, item.line, "has a choice without tokens")
            if longest > self.source.max_scored:
                rule = f"has {longest} tokens with its longest choice; at most"
                rule = f"{rule} {self.source.max_scored} can be scored at once"
                raise DataRejected(task.source, item.line, rule)
            encoded.append((prompt, choices))

    def tokens(self, task: Task) -> object:
        return self._items[task.name]

    def scores(self, todo: _Todo, count: _Count, tell: Callable[[], None]) -> _Done:
        plan = [
            (task, adapter, index, choice)
            for task, adapters in todo
            for adapter in adapters
            for index in range(len(task.items))
            for choice in range(len(self._items[task.name][index][1]))
        ]
        totals: dict[tuple[str, str], dict[tuple[int, int], float]] = {}

        def continuations() -> Iterator[Continuation]:
            for key, (task, adapter, index, choice) in enumerate(plan):
                prompt, choices = self._items[task.name][index]
                yield Continuation(adapter, key, prompt, choices[choice])

        for found in self.source.likelihoods(continuations()):
            task, adapter, index, choice = plan[found.continuation.key]
            known = totals.setdefault((task.name, adapter), {})
            known[index, choice] = found.total
            count.tokens += len(found.continuation.token_ids)
            items = self._items[task.name]
            # An item counts when its last choice is known; they come in any order.
            if all((index, other) in known for other in range(len(items[index][1]))):
                count.items += 1
                tell()
            if len(known) == sum(len(choices) for _, choices in items):
                yield task, adapter, len(items), self._values(task, known)

    def _values(self, task: Task, known: Mapping[tuple[int, int], float]) -> Values:
        items = [item for item in task.items if isinstance(item, ChoiceItem)]
        return choice_values(
            items,
            [[known[i, c] for c in range(len(item.choices))] for i, item in enumerate(items)],
            [[len(choice.encode()) for choice in item.choices] for item in items],
        )


class _Forgetting(_Run):
    metric = "forgetting"

    def __init__(self, source: AnswerSource, on_answer: Callable[[Graded], None] | None) -> None:
        super().__init__(source, on_answer)
        self._windows: dict[str, list[tuple[int, ...]]] = {}

    def add(self, task: Task) -> None:
        self.tasks.append(task)
        windows: list[tuple[int, ...]] = []
        size = task.max_tokens
        if size > self.source.max_scored // 2:
            rule = f"has windows of {size} tokens; at most {self.source.max_scored // 2} can be"
            raise DataRejected(task.source, None, f"{rule} compared at once; give :length=…")
        for item in task.items:
            assert isinstance(item, TextItem)
            ids = self.source.encode_text(item.text)
            if len(ids) < 2:
                raise DataRejected(task.source, item.line, "has fewer than two tokens")
            parts = [ids[start : start + size] for start in range(0, len(ids), size)]
            windows += [part for part in parts if len(part) >= 2]
        self._windows[task.name] = windows[: task.limit]

    def tokens(self, task: Task) -> object:
        return self._windows[task.name]

    def size(self, task: Task) -> int:
        return len(self._windows[task.name])

    def scores(self, todo: _Todo, count: _Count, tell: Callable[[], None]) -> _Done:
        for task, adapters in todo:
            parts: dict[str, list[Divergence]] = {}
            windows = self._windows[task.name]
            if not adapters:
                continue
            for part in self.source.divergences(adapters, windows):
                parts.setdefault(part.adapter, []).append(part)
                count.items += 1
                count.tokens += part.positions
                tell()
            for adapter in adapters:
                found = sorted(parts[adapter], key=lambda part: part.key)
                positions = sum(part.positions for part in found)
                yield task, adapter, positions, forgetting_values(found)


_RUNS: Mapping[str, type[_Run]] = {run.metric: run for run in (_Exact, _Choice, _Forgetting)}
