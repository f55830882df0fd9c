"""What a blend is: one form and one digest for every way to write the same sum."""

import random
import re
from dataclasses import dataclass, replace

import pytest

from shoal.adapters.blending import Blend, blended


@dataclass(frozen=True)
class Version:
    name: str
    version: int
    digest: str


A, B, C = (Version(name, i, name * 64) for i, name in enumerate("abc", 1))
TWIN = Version("twin", 9, A.digest)


def digest(*asked: tuple[Version, float]) -> str:
    blend = blended(asked)
    assert isinstance(blend, Blend)
    return blend.digest


def test_one_adapter_with_weight_1_is_itself_and_nothing_is_none() -> None:
    assert blended([(A, 1.0)]) is A
    assert blended([(B, 0.0), (A, 0.25), (A, 0.75)]) is A
    assert blended([]) is None
    assert blended([(A, 0.0), (B, -0.0)]) is None
    assert blended([(A, 0.1), (TWIN, -0.1)]) is None
    assert isinstance(blended([(A, 1.0), (B, 1e-300)]), Blend)
    assert isinstance(blended([(A, 0.9999999999999999)]), Blend)


def test_a_digest_is_of_contents_and_weights_alone() -> None:
    base = digest((A, 0.5), (B, 0.25))
    assert re.fullmatch(r"[0-9a-f]{64}", base)
    assert base == digest((B, 0.25), (A, 0.5))
    assert base == digest((TWIN, 0.5), (replace(B, name="other", version=7), 0.25))
    assert base == digest((B, 0.25), (C, 0.0), (A, 0.75), (A, -0.25))
    others = [
        digest((A, 0.25), (B, 0.5)),
        digest((A, 0.5), (C, 0.25)),
        digest((A, 0.5)),
        digest((A, -0.5), (B, 0.25)),
        digest((A, 0.5000000000000001), (B, 0.25)),
        digest((A, 0.5), (B, 0.25), (C, 5e-324)),
    ]
    assert len({base, A.digest, B.digest, *others}) == len(others) + 3


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_parts_does_not_matter(seed: int) -> None:
    """Not even to the last bit of weights that are added."""
    rng = random.Random(seed)
    asked = [(rng.choice([A, B, C, TWIN]), rng.uniform(-100, 100)) for _ in range(8)]
    first = blended(asked)
    assert isinstance(first, Blend)
    assert [v.digest for v, _ in first.parts] == sorted({v.digest for v, _ in asked})
    for _ in range(10):
        rng.shuffle(asked)
        again = blended(asked)
        assert isinstance(again, Blend)
        assert again.digest == first.digest
        assert [(v.digest, w) for v, w in again.parts] == [(v.digest, w) for v, w in first.parts]


def test_it_is_described_as_asked() -> None:
    blend = blended([(B, -0.3), (A, 0.7), (TWIN, 2.0), (C, 0.0), (A, 1e-9)])
    assert isinstance(blend, Blend)
    assert blend.described(lambda v: v.name) == "b@2*-0.3,a@1*0.7,twin@9*2,c@3*0,a@1*1e-09"
