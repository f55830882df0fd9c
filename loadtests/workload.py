"""What a load test sends, decided before anything is sent: arrivals, lengths, adapters.

Pure and seeded: the same workload and seed give the same requests on every machine, so two runs
(or two servers) can be compared request by request. It knows nothing of HTTP or of clocks.
"""

import bisect
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

Popularity = Literal["uniform", "zipf", "each", "one"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Token counts drawn uniformly from ``[minimum, maximum]``."""

    minimum: int
    maximum: int

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.maximum:
            raise ValueError(f"lengths must satisfy 1 <= min <= max, got {self}")

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.minimum, self.maximum)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A seeded description of a load.

    Attributes:
        num_requests: how many requests in all.
        request_rate: mean arrivals per second; None sends everything at time 0.
        burstiness: shape of the gamma distribution of the gaps; 1 is Poisson, below 1 is burstier.
        input_tokens, output_tokens: lengths per request.
        shared_prefix_tokens: leading prompt tokens that all requests have in common.
        popularity: how an adapter is drawn for a request:
            ``uniform`` each equally likely; ``zipf`` the k-th with weight ``1 / k**zipf_alpha``;
            ``each`` round robin, so that neighbours always differ; ``one`` always the first.
        base_share: probability that a request uses the base instead.
    """

    num_requests: int
    request_rate: float | None = None
    burstiness: float = 1.0
    input_tokens: Lengths
    output_tokens: Lengths
    shared_prefix_tokens: int = 0
    popularity: Popularity = "uniform"
    zipf_alpha: float = 1.0
    base_share: float = 0.0

    def __post_init__(self) -> None:
        if self.num_requests < 1:
            raise ValueError(f"num_requests must be at least 1, got {self.num_requests}")
        if self.request_rate is not None and not self.request_rate > 0:
            raise ValueError(f"request_rate must be above 0, got {self.request_rate}")
        if not self.burstiness > 0:
            raise ValueError(f"burstiness must be above 0, got {self.burstiness}")
        if not 0 <= self.base_share <= 1:
            raise ValueError(f"base_share must be within 0..1, got {self.base_share}")
        if not 0 <= self.shared_prefix_tokens <= self.input_tokens.minimum:
            raise ValueError(
                "shared_prefix_tokens must be within 0..input_tokens.minimum, "
                f"got {self.shared_prefix_tokens}"
            )


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request: when it is sent, to which adapter, with which tokens.

    Attributes:
        at_s: seconds after the start of the run.
        adapter: model name to ask for; None is the base.
    """

    index: int
    at_s: float
    adapter: str | None
    prompt_ids: tuple[int, ...]
    max_tokens: int


def plan_requests(
    workload: Workload, *, adapters: Sequence[str], token_ids: Sequence[int], seed: int
) -> list[PlannedRequest]:
    """Draw every request of the workload.

    Arrivals, lengths and adapters use separate random streams, so that changing one of them (for
    example the number of adapters) leaves the others as they were.

    Args:
        adapters: names to draw from, most popular first; empty means base only.
        token_ids: vocabulary that prompts are drawn from.
    """
    arrivals = random.Random(f"{seed}/arrivals")
    lengths = random.Random(f"{seed}/lengths")
    tokens = random.Random(f"{seed}/tokens")
    prefix = tuple(tokens.choices(token_ids, k=workload.shared_prefix_tokens))
    choose = _AdapterChoice(workload, adapters, random.Random(f"{seed}/adapters"))
    planned, at_s = [], 0.0
    for index in range(workload.num_requests):
        wanted = workload.input_tokens.draw(lengths)
        rest = tokens.choices(token_ids, k=wanted - len(prefix))
        planned.append(
            PlannedRequest(
                index=index,
                at_s=at_s,
                adapter=choose(index),
                prompt_ids=prefix + tuple(rest),
                max_tokens=workload.output_tokens.draw(lengths),
            )
        )
        at_s += _gap_s(workload, arrivals)
    return planned


def _gap_s(workload: Workload, rng: random.Random) -> float:
    if workload.request_rate is None:
        return 0.0
    # A gamma distribution with this scale has mean 1 / rate for every burstiness.
    scale = 1.0 / (workload.request_rate * workload.burstiness)
    return rng.gammavariate(workload.burstiness, scale)


@dataclass(frozen=True, slots=True)
class NameRange(Sequence[str]):
    """Names that count up, such as ``u007``, ``u008``, ``u009``; none is kept.

    Attributes:
        prefix: what they begin with.
        digits: how many each ends with.
    """

    prefix: str
    digits: int
    numbers: range

    @classmethod
    def parse(cls, text: str) -> "NameRange":
        """``FIRST:LAST``, both included.

        Raises:
            ValueError: they do not end in equally many digits that count up, or begin differently.
        """
        first, _, last = text.partition(":")
        prefix = first.rstrip("0123456789")
        a, b = first[len(prefix) :], last[len(prefix) :]
        counts = a.isdecimal() and b.isdecimal() and len(a) == len(b) and int(a) <= int(b)
        if not counts or not last.startswith(prefix):
            raise ValueError(f"{text!r} must be FIRST:LAST, such as u000:u999")
        return cls(prefix, len(a), range(int(a), int(b) + 1))

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[str]: ...
    def __getitem__(self, at: int | slice) -> str | Sequence[str]:
        if isinstance(at, slice):
            return NameRange(self.prefix, self.digits, self.numbers[at])
        return f"{self.prefix}{self.numbers[at]:0{self.digits}}"


class _AdapterChoice:
    """Draws an adapter name for each request."""

    def __init__(self, workload: Workload, adapters: Sequence[str], rng: random.Random) -> None:
        self._workload, self._adapters, self._rng = workload, adapters, rng
        weights = (1.0 / (k + 1) ** workload.zipf_alpha for k in range(len(adapters)))
        self._cumulative = list(itertools.accumulate(weights))

    def __call__(self, index: int) -> str | None:
        if not self._adapters:
            return None
        if self._rng.random() < self._workload.base_share:
            return None
        match self._workload.popularity:
            case "one":
                return self._adapters[0]
            case "each":
                return self._adapters[index % len(self._adapters)]
            case "uniform":
                return self._rng.choice(self._adapters)
            case "zipf":
                at = self._rng.random() * self._cumulative[-1]
                return self._adapters[bisect.bisect_right(self._cumulative, at)]
