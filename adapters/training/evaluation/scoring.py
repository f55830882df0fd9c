"""From answers, likelihoods and divergences to the numbers of a report. Pure."""

import math
from collections.abc import Mapping, Sequence

from shoal.adapters.training.evaluation.extraction import RULES, normalised, wanted
from shoal.adapters.training.evaluation.source import Divergence
from shoal.adapters.training.evaluation.tasks import AnswerItem, ChoiceItem, Task

Values = Mapping[str, float]


def grade(task: Task, index: int, text: str) -> float:
    """How much of an answer is right, 0 to 1: the task's own grader, or equality with an answer.

    Args:
        text: all that was generated.
    """
    found = RULES[task.extract](text)
    if task.grader is not None:
        return task.grader(index, found)
    item = task.items[index]
    assert isinstance(item, AnswerItem)
    right = {normalised(wanted(task.extract, answer)) for answer in item.answers}
    return float(normalised(found) in right)


def exact_values(grades: Sequence[float], finished: Sequence[bool]) -> Values:
    """``accuracy``: share of answers wholly right; ``score``: mean grade, which differs from it
    only where a task's own grader gives a part; ``unfinished``: share cut at ``max_tokens``."""
    right = [float(value >= 1.0) for value in grades]
    return {
        "accuracy": mean(right),
        "stderr": standard_error(right),
        "score": mean(grades),
        "unfinished": mean([float(not done) for done in finished]),
    }


def choice_values(
    items: Sequence[ChoiceItem], totals: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]]
) -> Values:
    """Share of items whose right choice is the likeliest.

    Args:
        totals: of each item, ``log p(choice | prompt)`` of each choice, in nats.
        lengths: of each item, the bytes of each choice in UTF-8.

    Returns:
        ``accuracy`` by the totals; ``accuracy_norm`` by the totals divided by the bytes. Of equal
        ones the first counts. Both with their standard errors.
    """
    plain, norm = [], []
    for item, values, sizes in zip(items, totals, lengths, strict=True):
        scaled = [value / size for value, size in zip(values, sizes, strict=True)]
        plain.append(float(likeliest(values) == item.answer))
        norm.append(float(likeliest(scaled) == item.answer))
    return {
        "accuracy": mean(plain),
        "stderr": standard_error(plain),
        "accuracy_norm": mean(norm),
        "stderr_norm": standard_error(norm),
    }


def forgetting_values(parts: Sequence[Divergence]) -> Values:
    """Means over all positions of all texts, in nats.

    ``cross_entropy`` is MiLoRA's forgetting (its section 5.4): the loss of the adapted model with
    the base's own distribution as the target. The base's is its ``entropy``; ``kl`` is what comes
    on top. ``loss`` and ``perplexity`` are of the texts' own tokens.
    """
    positions = sum(part.positions for part in parts)

    def over(total: float) -> float:
        return total / positions

    loss = over(math.fsum(part.nll for part in parts))
    return {
        "cross_entropy": over(math.fsum(part.cross_entropy for part in parts)),
        "entropy": over(math.fsum(part.entropy for part in parts)),
        "kl": over(math.fsum(part.kl for part in parts)),
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
    }


def likeliest(values: Sequence[float]) -> int:
    """Index of the largest; the first of equal ones."""
    return max(range(len(values)), key=lambda index: values[index])


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean of at least one value."""
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean, over items; 0 of one value."""
    if len(values) < 2:
        return 0.0
    centre = mean(values)
    variance = math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))
