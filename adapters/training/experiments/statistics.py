"""Means, standard deviations and verdicts over seeds. Pure.

A claim compares two settings seed by seed: the seeds share their data's order, so differences have
less noise than the values. It is said to hold, or not to, when the 95 % confidence interval of the
mean difference (Student's t) leaves zero out; otherwise nothing can be said.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["holds", "does not hold", "no difference to be seen", "not measured"]
# Two-sided 95 % quantiles of Student's t for 1, 2, … degrees of freedom; beyond: the last.
_T95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)


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


def half_width(found: Spread) -> float:
    """Of the mean's 95 % confidence interval; infinite for one value."""
    if found.count < 2:
        return math.inf
    quantile = _T95[min(found.count - 1, len(_T95)) - 1]
    return quantile * found.sd / math.sqrt(found.count)


def verdict(differences: Sequence[float]) -> Verdict:
    """Of a claim that the differences are above zero, one difference a seed."""
    if not differences:
        return "not measured"
    found = spread(differences)
    if abs(found.mean) <= half_width(found):
        return "no difference to be seen"
    return "holds" if found.mean > 0 else "does not hold"
