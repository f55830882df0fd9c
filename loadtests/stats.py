"""From samples to numbers: percentiles, rates, goodput; overall and per adapter.

Pure. Times are seconds on one clock; reported latencies are milliseconds.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What happened to one request.

    Attributes:
        adapter: model name asked for; None is the base.
        sent_s, token_s, done_s: when it was sent, when each output token arrived, when it ended.
            Tokens that arrived in one chunk have the same time.
        prompt_tokens: as reported by the server.
        error: why it failed, or None. A sample with an error counts for nothing else.
    """

    index: int
    adapter: str | None
    sent_s: float
    token_s: tuple[float, ...] = ()
    done_s: float
    prompt_tokens: int = 0
    error: str | None = None

    @property
    def ttft_ms(self) -> float:
        return (self.token_s[0] - self.sent_s) * 1e3

    @property
    def itl_ms(self) -> tuple[float, ...]:
        """Gaps between tokens."""
        return tuple((b - a) * 1e3 for a, b in zip(self.token_s, self.token_s[1:], strict=False))

    @property
    def tpot_ms(self) -> float | None:
        """Mean time per token after the first; None for a single token."""
        if len(self.token_s) < 2:
            return None
        return (self.token_s[-1] - self.token_s[0]) * 1e3 / (len(self.token_s) - 1)


@dataclass(frozen=True, slots=True)
class Percentiles:
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Percentiles | None":
        """Nearest-rank percentiles, or None without values."""
        ordered = sorted(values)
        if not ordered:
            return None
        return cls(*(percentile(ordered, q) for q in (0.50, 0.90, 0.99)))


def percentile(ordered: Sequence[float], q: float) -> float:
    """The smallest value that at least ``q`` of the sorted values do not exceed."""
    # The tolerance keeps 0.9 * 10 = 9.000000000000002 from becoming rank 10.
    return ordered[max(0, math.ceil(q * len(ordered) - 1e-9) - 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Numbers for a set of samples.

    Attributes:
        output_tok_s: output tokens received per second between the first send and the last token.
        goodput_req_s: completed requests per second that met every objective; None without any.
    """

    completed: int
    failed: int
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    output_tok_s: float
    request_s: float
    ttft_ms: Percentiles | None
    itl_ms: Percentiles | None
    tpot_ms: Percentiles | None
    goodput_req_s: float | None = field(default=None)


def summarise(samples: Sequence[Sample], objectives: Mapping[str, float] | None = None) -> Summary:
    """Summarise samples.

    Args:
        objectives: upper limits in ms for ``ttft``, ``tpot`` or ``e2el``.
    """
    good = [s for s in samples if s.error is None and s.token_s]
    start = min((s.sent_s for s in samples), default=0.0)
    end = max((s.done_s for s in good), default=start)
    duration = max(end - start, 1e-9)
    output_tokens = sum(len(s.token_s) for s in good)
    return Summary(
        completed=len(good),
        failed=len(samples) - len(good),
        duration_s=duration,
        prompt_tokens=sum(s.prompt_tokens for s in good),
        output_tokens=output_tokens,
        output_tok_s=output_tokens / duration,
        request_s=len(good) / duration,
        ttft_ms=Percentiles.of(s.ttft_ms for s in good),
        itl_ms=Percentiles.of(gap for s in good for gap in s.itl_ms),
        tpot_ms=Percentiles.of(t for s in good if (t := s.tpot_ms) is not None),
        goodput_req_s=(sum(_meets(s, objectives) for s in good) / duration if objectives else None),
    )


def by_adapter(samples: Sequence[Sample]) -> dict[str | None, list[Sample]]:
    """Samples grouped by adapter, the busiest adapter first, the base (None) before all."""
    groups: dict[str | None, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.adapter].append(sample)
    order = sorted(groups, key=lambda name: (name is not None, -len(groups[name]), name or ""))
    return {name: groups[name] for name in order}


def _meets(sample: Sample, objectives: Mapping[str, float]) -> bool:
    measured = {
        "ttft": sample.ttft_ms,
        "tpot": sample.tpot_ms or 0.0,
        "e2el": (sample.done_s - sample.sent_s) * 1e3,
    }
    return all(measured[name] <= limit for name, limit in objectives.items())
