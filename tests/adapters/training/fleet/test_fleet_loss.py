"""The fleet's loss equals cross-entropy of all logits, forward and back, a piece at a time."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shoal.adapters.training.errors import BaseRejected
from shoal.adapters.training.fleet.loss import Head, weighted_nll

TOKENS, D, VOCABULARY = 40, 12, 31


def model(**config: Any) -> Any:
    torch.manual_seed(0)
    head = nn.Linear(D, VOCABULARY, bias=bool(config.pop("bias", False))).requires_grad_(False)
    return SimpleNamespace(
        get_output_embeddings=lambda: head, config=SimpleNamespace(**config), head=head
    )


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_cross_entropy_of_the_wanted_places(softcap: float | None, bias: bool) -> None:
    decoder = model(final_logit_softcapping=softcap, bias=bias)
    head = Head(decoder)
    head.piece = 5  # of 11 places: two pieces and a rest
    places = torch.tensor([3, 4, 5, 9, 10, 20, 21, 30, 31, 0, 0])  # the last two only fill up
    labels = torch.randint(0, VOCABULARY, (11,))
    weights = torch.cat([torch.rand(9), torch.zeros(2)])
    hidden = torch.randn(TOKENS, D, requires_grad=True)
    total, nll = weighted_nll(hidden, places, labels, weights, head)
    (2 * total).backward()

    other = hidden.detach().double().requires_grad_()
    logits = F.linear(other[places], decoder.head.weight.double())
    if bias:
        logits = logits + decoder.head.bias.double()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits, labels, reduction="none")
    (2 * (expected * weights.double()).sum()).backward()
    torch.testing.assert_close(nll.double(), expected.detach(), atol=1e-5, rtol=1e-5)
    assert hidden.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(hidden.grad.double(), other.grad, atol=1e-5, rtol=1e-5)
    assert not nll.requires_grad
    torch.testing.assert_close(head.nll(hidden.detach()[places], labels), nll)


def test_16_bit_logits_are_summed_in_float32() -> None:
    decoder = model()
    decoder.head.to(torch.bfloat16)
    hidden = torch.randn(TOKENS, D).to(torch.bfloat16).requires_grad_()
    places, labels = torch.arange(9), torch.randint(0, VOCABULARY, (9,))
    total, nll = weighted_nll(hidden, places, labels, torch.rand(9), Head(decoder))
    total.backward()
    with torch.no_grad():
        logits = decoder.head(hidden[places]).float()
    torch.testing.assert_close(nll, F.cross_entropy(logits, labels, reduction="none"))
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


def test_a_place_that_is_not_finite_changes_no_other_gradient() -> None:
    head = Head(model())
    hidden = torch.randn(TOKENS, D)
    hidden[7] = float("nan")
    hidden.requires_grad_()
    places, labels = torch.tensor([7, 8]), torch.tensor([1, 2])
    total, nll = weighted_nll(hidden, places, labels, torch.ones(2), head)
    total.backward()
    assert hidden.grad is not None
    assert torch.isfinite(nll).tolist() == [False, True]
    assert torch.isfinite(hidden.grad[8]).all()
    assert hidden.grad[8].abs().sum() > 0


def test_a_decoder_that_scales_its_logits_is_refused() -> None:
    with pytest.raises(BaseRejected, match="scales its logits"):
        Head(model(logits_scaling=8.0))
