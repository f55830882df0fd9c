"""What a blend is: a weighted sum of adapter versions, and the digest that says which one.

Pure. The sum itself is made in ``composing.py``, and only where it is needed: a blend is in no
registry, only in the host tier, under a digest of its own like any adapter's. Two requests that
mean the same sum have the same digest, in whatever order they name its parts.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Generic, Protocol, TypeVar

# Adapters of one blend: each is read from the store, and unpacked, while the blend is made.
PARTS_MAX = 8
# Of a weight: larger ones say more about a typing error than about a blend.
WEIGHT_MAX = 100.0

_TAG = "shoal blend 1\n"


class Version(Protocol):
    """The part of ``AdapterInfo`` that decides."""

    @property
    def version(self) -> int: ...
    @property
    def digest(self) -> str: ...


V = TypeVar("V", bound=Version)


@dataclass(frozen=True, slots=True)
class Blend(Generic[V]):
    """A sum that is not one of its adapters; made by ``blended``.

    Attributes:
        asked: versions and weights as the caller gave them.
        parts: the sum in its one form: each content once, none of weight zero, by digest.
        digest: sha256 (hex) of those; never that of a record.
    """

    asked: tuple[tuple[V, float], ...]
    parts: tuple[tuple[V, float], ...]
    digest: str

    def described(self, name_of: Callable[[V], str]) -> str:
        """``a@1*0.7,b@2*-0.3``, as asked; ``name_of`` says what the caller calls an adapter."""
        return ",".join(f"{name_of(v)}@{v.version}*{_number(weight)}" for v, weight in self.asked)


def blended(asked: Sequence[tuple[V, float]]) -> Blend[V] | V | None:
    """The sum of ``weight × adapter``; weights are finite.

    Returns:
        The adapter itself where the sum is one adapter with weight 1; None where nothing is left.
    """
    weights: dict[str, list[float]] = {}
    first: dict[str, V] = {}
    for version, weight in asked:
        first.setdefault(version.digest, version)
        weights.setdefault(version.digest, []).append(weight)
    # `fsum` rounds once, so that the order in which a sum is written does not matter.
    parts = tuple(
        (first[digest], total)
        for digest, total in ((digest, fsum(weights[digest])) for digest in sorted(weights))
        if total
    )
    if not parts:
        return None
    if len(parts) == 1 and parts[0][1] == 1.0:
        return parts[0][0]
    lines = "".join(f"{version.digest} {weight!r}\n" for version, weight in parts)
    digest = hashlib.sha256((_TAG + lines).encode()).hexdigest()
    return Blend(tuple(asked), parts, digest)


def _number(weight: float) -> str:
    """Exact, and without the ``.0`` of a whole number."""
    return repr(weight).removesuffix(".0")
