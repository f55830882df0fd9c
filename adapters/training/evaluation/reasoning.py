"""Tasks made by reasoning-gym: ``reasoning-gym:NAME[:size=100,seed=1000,…]``.

Needs reasoning-gym (the extra ``tasks``). An item is the generator's question, asked as a chat; an
answer is graded by the task's own scorer. Options that are not of an evaluation go to the
generator. The default seed is not that of training data.
"""

import ast
import json
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shoal.adapters.training.errors import DataRejected
from shoal.adapters.training.evaluation.spec import TaskSpec
from shoal.adapters.training.evaluation.tasks import AnswerItem, Prompt, Task, make_task

log = logging.getLogger(__name__)

PREFIX = "reasoning-gym:"
_OURS = ("name", "limit", "max_tokens", "extract", "length")
_DEFAULTS = {"size": "100", "seed": "1000"}


def read_reasoning_task(spec: TaskSpec) -> Task:
    """Generate a task.

    Raises:
        DataRejected: reasoning-gym is missing, or refuses the name or an option.
        OptionRejected: an option of the evaluation.
    """
    source = Path(str(spec))
    name = spec.source.removeprefix(PREFIX)
    asked = {k: v for k, v in {**_DEFAULTS, **spec.options}.items() if k not in _OURS}
    options = {key: _literal(text) for key, text in asked.items()}
    with _own_randomness():
        dataset = _dataset(source, name, options)
        entries = [dataset[index] for index in range(len(dataset))]
    items = tuple(
        AnswerItem(number, Prompt(messages=(("user", entry["question"]),)), (str(entry["answer"]),))
        for number, entry in enumerate(entries, 1)
    )
    if not items:
        raise DataRejected(source, None, "holds no items")

    def grade(index: int, answer: str) -> float:
        with _own_randomness():
            try:
                return float(dataset.score_answer(answer, entries[index]))
            # Some scorers read answers without checking them (prime_factorization wants integers):
            # whatever it is that they cannot read, it is not the answer.
            except Exception as error:
                log.debug("scorer failed task=%s item=%d: %s", name, index + 1, error)
                return 0.0

    graded_by = f"reasoning-gym {version('reasoning-gym')} {name} {json.dumps(asked)}"
    if "extract" not in spec.options:
        spec = TaskSpec(spec.source, {**spec.options, "extract": "answer-tag"})
    return make_task(spec.text("name") or name, source, items, spec, grade, graded_by)


def _dataset(source: Path, name: str, options: dict[str, Any]) -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        rule = "needs reasoning-gym: pip install 'shoal[tasks]'"
        raise DataRejected(source, None, rule) from error
    try:
        return reasoning_gym.create_dataset(name, **options)
    # What a generator's own checks raise: a wrong name, option, or value.
    except (ValueError, TypeError, AssertionError) as error:
        raise DataRejected(source, None, f"is refused by reasoning-gym: {error}") from error


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Some generators draw from Python's global source; nobody else's draws may depend on it."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
