"""Planned loads are reproducible and have the statistics they claim."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest

from shoal.loadtests.workload import (
    Lengths,
    NameRange,
    PlannedRequest,
    Workload,
    plan_requests,
)

NAMES = [f"a{i}" for i in range(20)]
WORKLOAD = Workload(
    num_requests=2000,
    request_rate=50.0,
    input_tokens=Lengths(minimum=8, maximum=32),
    output_tokens=Lengths(minimum=1, maximum=9),
)


def plan(workload: Workload, seed: int = 1, adapters: list[str] = NAMES) -> list[PlannedRequest]:
    return plan_requests(workload, adapters=adapters, token_ids=range(100, 200), seed=seed)


def test_the_same_seed_plans_the_same_requests() -> None:
    assert plan(WORKLOAD) == plan(WORKLOAD)
    assert plan(WORKLOAD, seed=2) != plan(WORKLOAD)


def test_changing_the_adapters_leaves_arrivals_and_prompts_alone() -> None:
    def rest(requests: list[PlannedRequest]) -> list[PlannedRequest]:
        return [replace(request, adapter=None) for request in requests]

    assert rest(plan(WORKLOAD)) == rest(plan(WORKLOAD, adapters=[]))


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_the_asked_rate_and_burstiness(burstiness: float) -> None:
    planned = plan(replace(WORKLOAD, num_requests=5000, burstiness=burstiness))
    gaps = [b.at_s - a.at_s for a, b in itertools.pairwise(planned)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.1)
    assert variance / mean**2 == pytest.approx(1 / burstiness, rel=0.25)


def test_no_rate_means_everything_at_once() -> None:
    assert {request.at_s for request in plan(replace(WORKLOAD, request_rate=None))} == {0.0}


def test_lengths_stay_in_range_and_reach_both_ends() -> None:
    planned = plan(WORKLOAD)
    assert {len(r.prompt_ids) for r in planned} == set(range(8, 33))
    assert {r.max_tokens for r in planned} == set(range(1, 10))


def test_popularity_shapes_the_draw() -> None:
    def counts(**change: object) -> Counter[str | None]:
        return Counter(r.adapter for r in plan(replace(WORKLOAD, **change)))  # type: ignore[arg-type]

    assert counts(popularity="one") == {"a0": 2000}
    assert set(counts(popularity="each").values()) == {100}
    assert max(counts(popularity="uniform").values()) < 160
    zipf = counts(popularity="zipf", zipf_alpha=1.0)
    assert zipf["a0"] / zipf["a1"] == pytest.approx(2.0, rel=0.25)
    assert counts(base_share=0.5)[None] == pytest.approx(1000, rel=0.1)


def test_a_shared_prefix_is_shared_by_all() -> None:
    planned = plan(replace(WORKLOAD, shared_prefix_tokens=8))
    assert len({r.prompt_ids[:8] for r in planned}) == 1
    assert len({r.prompt_ids[8:] for r in planned}) > 1000


@pytest.mark.parametrize(
    "change",
    [{"num_requests": 0}, {"request_rate": 0.0}, {"burstiness": 0.0}, {"base_share": 1.5},
     {"shared_prefix_tokens": 9}],
)  # fmt: skip
def test_impossible_loads_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(WORKLOAD, **change)  # type: ignore[arg-type]


def test_a_range_of_names_counts_up_without_being_made() -> None:
    names = NameRange.parse("u-1.0098:u-1.0102")
    assert list(names) == ["u-1.0098", "u-1.0099", "u-1.0100", "u-1.0101", "u-1.0102"]
    assert list(names[1:3]) == ["u-1.0099", "u-1.0100"]
    million = NameRange.parse("u0000000:u0999999")
    assert (len(million), million[-1]) == (1_000_000, "u0999999")
    planned = plan_requests(WORKLOAD, adapters=million, token_ids=[1, 2], seed=0)
    assert len({r.adapter for r in planned}) > 1900


@pytest.mark.parametrize("text", ["u1", "u1:u0", "u1:v2", "u1:u02", "u:u", "u1:x1", "1:", ""])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be FIRST:LAST"):
        NameRange.parse(text)
