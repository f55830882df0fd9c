"""``AnswerSource``: what an evaluation asks of whatever runs the model.

Pure vocabulary. ``shoal.server.evaluating`` answers with the serving engine, many adapters at once.
An adapter is a name that the source knows; ``BASE`` is the base itself.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from shoal.adapters.training.evaluation.tasks import Prompt

BASE = "base"


class PromptRejected(Exception):
    """The model's chat template, or its tokenizer, refuses a prompt; the text says why."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt to answer greedily, or at temperature 1 with a seed.

    Attributes:
        key: the caller's own; comes back with the answer.
        max_tokens: generated at most, >= 1.
        seed: None is greedy.
        ignore_end: go on past the end of the sequence.
    """

    adapter: str
    key: int
    prompt_ids: tuple[int, ...]
    max_tokens: int
    seed: int | None = None
    ignore_end: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What was generated.

    Attributes:
        token_ids: a token that ended it included.
        text: without special tokens.
        finished: it ended by itself, within ``max_tokens``.
    """

    question: Question
    token_ids: tuple[int, ...]
    text: str
    finished: bool


@dataclass(frozen=True, slots=True)
class Continuation:
    """Tokens whose likelihood behind a prompt is asked for; both not empty."""

    adapter: str
    key: int
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Likelihood:
    """``total`` is the sum over the continuation of ``log p(token | all before it)``, in nats."""

    continuation: Continuation
    total: float


@dataclass(frozen=True, slots=True)
class Divergence:
    """How an adapter's next-token distribution ``q`` differs from the base's ``p`` on a text.

    Sums over the text's positions but the first, in nats.

    Attributes:
        key: the text's index.
        positions: how many.
        cross_entropy: of ``-sum_v p(v) log q(v)``.
        entropy: of ``-sum_v p(v) log p(v)``, the least that ``cross_entropy`` can be.
        kl: of ``sum_v p(v) (log p(v) - log q(v))``, which is their difference.
        nll: of ``-log q(token)``, the usual loss.
    """

    adapter: str
    key: int
    positions: int
    cross_entropy: float
    entropy: float
    kl: float
    nll: float


class AnswerSource(Protocol):
    """A base model and adapters by name. Results come in any order.

    Attributes:
        base_digest: identifies the base's weights.
        dtype: what it computes in, such as ``float32``.
        max_length: tokens of prompt and answer together, at most.
        max_scored: tokens of prompt and continuation, or twice those of a text, at most.
    """

    @property
    def base_digest(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def max_length(self) -> int: ...
    @property
    def max_scored(self) -> int: ...

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt as a server sees it, or PromptRejected."""
        ...

    def encode_continuation(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that stands behind another."""
        ...

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Token ids of a text from its beginning."""
        ...

    def generate(self, questions: Iterable[Question]) -> Iterator[Answer]:
        """Answer; adapters are best served when questions to one follow each other."""
        ...

    def likelihoods(self, continuations: Iterable[Continuation]) -> Iterator[Likelihood]:
        """Score given continuations."""
        ...

    def divergences(
        self, adapters: Sequence[str], texts: Sequence[tuple[int, ...]]
    ) -> Iterator[Divergence]:
        """Compare each adapter with the base on each text."""
        ...
