"""The sampler against the definitions of its filters, row by row."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shoal.server.engine.plan import Row
from shoal.server.engine.request import SamplingParams
from shoal.server.model.sampler import Sampler, needs_host, uniform_of

VOCAB = 50


def row(sampling: SamplingParams, **kwargs: object) -> Row:
    fields = {"request_id": "a", "token_ids": (1,), "start": 0, "block_ids": (0,), "sample": True}
    return Row(sampling=sampling, **(fields | kwargs))  # type: ignore[arg-type]


def params(**kwargs: object) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 8} | kwargs))  # type: ignore[arg-type]


def logits(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def sampler(seed: int = 0) -> Sampler:
    return Sampler(random.Random(seed))


def draws(sampling: SamplingParams, count: int = 400) -> set[int]:
    scores = logits(1).expand(count, VOCAB)
    return set(sampler().sample(scores, [row(sampling)] * count).token_ids)


def test_temperature_zero_is_the_argmax_and_logits_are_left_alone() -> None:
    scores = logits(5)
    before = scores.clone()
    out = sampler().sample(scores, [row(params(temperature=0.0))] * 5)
    assert out.token_ids == scores.argmax(dim=-1).tolist()
    assert torch.equal(scores, before)


def test_a_top_k_beyond_the_vocabulary_filters_nothing() -> None:
    asked = [row(params(top_k=k, seed=5)) for k in (VOCAB, 10**9, 10**30)]
    assert len(set(sampler().sample(logits(1).expand(3, VOCAB), asked).token_ids)) == 1


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    scores = logits(6)
    rows = [
        row(params(temperature=t, top_k=k, top_p=p, min_p=m, seed=s), output_tokens=s)
        for t, k, p, m, s in [
            (1.0, 0, 1.0, 0.0, 1),
            (0.7, 5, 1.0, 0.0, 2),
            (1.3, 0, 0.8, 0.0, 3),
            (1.0, 0, 1.0, 0.1, 4),
            (0.0, 0, 1.0, 0.0, 5),
            (2.0, 9, 0.9, 0.05, 6),
        ]
    ]
    together = sampler(1).sample(scores, rows).token_ids
    alone = [sampler(2).sample(scores[i : i + 1], [rows[i]]).token_ids[0] for i in range(6)]
    assert together == alone


def test_frequencies_follow_the_softmax() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0]).expand(20_000, 3)
    out = sampler().sample(scores, [row(params())] * 20_000)
    got = torch.bincount(torch.tensor(out.token_ids), minlength=3) / 20_000
    assert torch.allclose(got, torch.softmax(scores[0], dim=-1), atol=0.015)


def test_top_k_keeps_the_k_best() -> None:
    assert draws(params(top_k=3, temperature=5.0)) == set(logits(1)[0].topk(3).indices.tolist())


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    probs, order = torch.softmax(logits(1)[0], dim=-1).sort(descending=True)
    needed = int((probs.cumsum(0) < 0.9).sum()) + 1
    assert draws(params(top_p=0.9), 3000) == set(order[:needed].tolist())


def test_min_p_is_relative_to_the_best_token() -> None:
    probs = torch.softmax(logits(1)[0], dim=-1)
    allowed = set((probs >= 0.2 * probs.max()).nonzero().flatten().tolist())
    assert draws(params(min_p=0.2), 3000) == allowed


def test_a_tiny_top_p_is_greedy() -> None:
    assert draws(params(top_p=1e-9)) == {int(logits(1)[0].argmax())}


def test_the_uniform_number_points_into_the_kept_tokens_in_vocabulary_order() -> None:
    scores = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3])).expand(8, 4)
    asked = [row(params(seed=seed, top_k=3)) for seed in range(8)]
    want = []
    for one in asked:
        u = uniform_of(one, random.Random(0))
        want.append(1 if u < 4 / 9 else 2 if u < 6 / 9 else 3)  # 0 is the least likely, dropped
    assert sampler().sample(scores, asked).token_ids == want
    assert len(set(want)) > 1


def test_the_uniform_number_is_the_seeds_or_the_entropys() -> None:
    seeded = row(params(seed=3), output_tokens=2)
    assert uniform_of(seeded, random.Random(1)) == uniform_of(seeded, random.Random(2))
    assert 0 <= uniform_of(seeded, random.Random(1)) < 1
    assert uniform_of(row(params()), random.Random(1)) == random.Random(1).random()
    untouched = random.Random(1)
    assert uniform_of(row(params(temperature=0.0)), untouched) == 0.0
    assert untouched.random() == random.Random(1).random()


@pytest.mark.parametrize(
    ("one", "needed"),
    [
        (row(params(temperature=0.0)), False),
        (row(params(top_k=3, top_p=0.9, min_p=0.1, seed=1), history_ids=(1, 2)), False),
        (row(params(), suppressed_ids=(4,)), True),
        (row(params(logit_bias=((4, 1.0),))), True),
        (row(params(logprobs=0)), True),
        (row(params(presence_penalty=0.1)), True),
        (row(params(frequency_penalty=-0.1)), True),
        (row(params(repetition_penalty=1.1)), True),
    ],
)
def test_only_a_row_that_asks_for_more_than_a_draw_needs_the_host(one: Row, needed: bool) -> None:
    assert needs_host(one) is needed


def test_a_row_whose_every_token_is_suppressed_is_reported() -> None:
    out = sampler().sample(logits(1), [row(params(), suppressed_ids=tuple(range(VOCAB)))])
    assert out.finite == [False]


def test_seeded_draws_differ_between_positions_and_seeds() -> None:
    scores = torch.zeros(1, VOCAB)

    def token(seed: int, position: int) -> int:
        return (
            sampler().sample(scores, [row(params(seed=seed), output_tokens=position)]).token_ids[0]
        )

    assert len({token(1, position) for position in range(20)}) > 8
    assert len({token(seed, 0) for seed in range(20)}) > 8
    assert token(1, 3) == token(1, 3)


def test_penalties_follow_their_definitions() -> None:
    scores = torch.zeros(1, VOCAB)
    scores[0, 3], scores[0, 4], scores[0, 5] = 2.0, 1.9, 0.5
    history = {"history_ids": (3, 4, 4), "prompt_tokens": 1, "output_tokens": 2}
    greedy = params(temperature=0.0)

    def best(sampling: SamplingParams) -> int:
        return sampler().sample(scores, [row(sampling, **history)]).token_ids[0]

    assert best(replace(greedy, frequency_penalty=0.5)) == 3  # 4 was said twice: 1.9 - 1.0
    assert best(replace(greedy, presence_penalty=-0.5)) == 4  # 4 is output, 3 only prompt
    assert best(replace(greedy, repetition_penalty=100.0)) == 5


def test_suppressed_tokens_are_never_chosen() -> None:
    scores = torch.zeros(1, VOCAB)
    scores[0, 7], scores[0, 8], scores[0, 9] = 3.0, 2.0, 1.0
    greedy = params(temperature=0.0)
    assert sampler().sample(scores, [row(greedy, suppressed_ids=(7, 8))]).token_ids == [9]
    assert sampler().sample(scores, [row(greedy)]).token_ids == [7]


def test_logit_bias_moves_the_choice() -> None:
    sampling = params(temperature=0.0, logit_bias=((11, 100.0),))
    assert sampler().sample(logits(1), [row(sampling)]).token_ids == [11]


def test_logprobs_are_of_the_unmodified_logits() -> None:
    scores = logits(3)
    rows = [
        row(params(temperature=0.0)),
        row(params(temperature=0.0, logprobs=0)),
        row(params(temperature=0.2, logprobs=4, top_k=2, seed=3)),
    ]
    out = sampler().sample(scores, rows)
    want = torch.log_softmax(scores, dim=-1)
    plain, chosen_only, full = out.logprobs
    assert plain is None
    assert chosen_only is not None
    assert chosen_only.top == ()
    assert full is not None
    assert full.logprob == pytest.approx(float(want[2, out.token_ids[2]]))
    assert [token for token, _ in full.top] == want[2].topk(4).indices.tolist()


def test_a_poisoned_row_is_reported_and_spoils_no_other() -> None:
    scores = logits(3)
    scores[1, 5] = float("nan")
    rows = [row(params(seed=1)), row(params(seed=2)), row(params(seed=3))]
    out = sampler().sample(scores, rows)
    assert out.finite == [True, False, True]
    assert out.token_ids[0] == sampler().sample(scores[:1], rows[:1]).token_ids[0]
    assert out.token_ids[2] == sampler().sample(scores[2:], rows[2:]).token_ids[0]
