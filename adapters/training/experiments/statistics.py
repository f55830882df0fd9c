"""Means, standard deviations and verdicts over seeds. Pure.

A claim compares two settings seed by seed: the seeds share their data's order, so differences have
less noise than the values. It is said to hold, or not to, when the mean difference is at least two
of its standard errors away from zero; otherwise nothing can be said.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["holds", "does not hold", "no difference to be seen", "not measured"]
ERRORS_AWAY = 2.0


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (0 of one value) of ``count`` values."""

    mean: float
    sd: float
    count: int

    def text(self, scale: float = 1.0, digits: int = 1) -> str:
        """``mean ± sd``."""
        return f"{scale * self.mean:.{digits}f} ± {scale * self.sd:.{digits}f}"


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Spread(mean, 0.0, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Spread(mean, math.sqrt(variance), len(values))


def verdict(differences: Sequence[float]) -> Verdict:
    """Of a claim that the differences are above zero, one difference a seed."""
    if not differences:
        return "not measured"
    found = spread(differences)
    error = found.sd / math.sqrt(found.count)
    if found.count < 2 or abs(found.mean) < ERRORS_AWAY * error or found.mean == 0:
        return "no difference to be seen"
    return "holds" if found.mean > 0 else "does not hold"
