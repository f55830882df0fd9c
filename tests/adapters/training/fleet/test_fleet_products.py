"""The fleet's linears: forward, input gradient and bank gradient equal autograd of the formula."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.adapters.training.fleet.products import core_linear, fold_linear
from shoal.kernels.lane_rows import upload_rows

CPU = torch.device("cpu")
# Rows of five lanes: unequal numbers, an unused row, two lanes without any.
OWNERS = {"ragged": [3, 3, 0, -1, 1], "equal": [2, 2, 4, 4], "one": [1]}
LANES, LENGTH, D_IN, D_OUT, RANK = 5, 7, 22, 13, 4


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain_core(x: Tensor, cores: Tensor, weight: Tensor, basis: Tensor, scale: float) -> Tensor:
    """One row: ``y0 + s·((y0 B) Rᵀ) Bᵀ``, as the plain trainer has it."""
    y0 = x @ weight.T
    return y0 + scale * (y0 @ basis) @ cores.T @ basis.T


def plain_fold(x: Tensor, block: Tensor, weight: Tensor) -> Tensor:
    """One row: ``x Wᵀ + S_r(x) D``."""
    rank = block.shape[0]
    padded = F.pad(x, (0, -x.shape[-1] % rank))
    return x @ weight.T + padded.view(*x.shape[:-1], -1, rank).sum(-2) @ block


@pytest.mark.parametrize("method", ["core", "fold"])
@pytest.mark.parametrize("owners", OWNERS.values(), ids=OWNERS)
def test_gradients_are_those_of_the_formula_in_float64(owners: list[int], method: str) -> None:
    rows = upload_rows(owners, CPU)
    weight, x = draw(1, D_OUT, D_IN), draw(2, len(owners), LENGTH, D_IN)
    dy = draw(3, len(owners), LENGTH, D_OUT)
    basis = torch.linalg.qr(draw(4, D_OUT, RANK)).Q
    shape = (LANES, RANK, RANK) if method == "core" else (LANES, RANK, D_OUT)
    bank, grads = draw(5, *shape).requires_grad_(), torch.full(shape, 7.0)
    x.requires_grad_()
    if method == "core":
        y = core_linear(x, bank, grads, weight, basis, basis.T @ weight, rows, 0.5)
    else:
        y = fold_linear(x, bank, grads, weight, rows)
    y.backward(dy)

    x64, bank64 = (t.detach().double().requires_grad_() for t in (x, bank))
    w64, b64 = weight.double(), basis.double()
    parts = []
    for row, lane in enumerate(owners):
        if lane < 0:  # the base alone
            parts.append(x64[row] @ w64.T)
        elif method == "core":
            parts.append(plain_core(x64[row], bank64[lane], w64, b64, 0.5))
        else:
            parts.append(plain_fold(x64[row], bank64[lane], w64))
    expected = torch.stack(parts)
    expected.backward(dy.double())
    assert x64.grad is not None
    assert bank64.grad is not None
    close = {"atol": 2e-5, "rtol": 1e-5}
    torch.testing.assert_close(y.double(), expected, **close)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), x64.grad, **close)
    used = sorted({lane for lane in owners if lane >= 0})
    torch.testing.assert_close(grads[used].double(), bank64.grad[used], **close)
    unused = [lane for lane in range(LANES) if lane not in used]
    assert (grads[unused] == 7.0).all()  # lanes that are not in the step are not touched


@pytest.mark.parametrize("method", ["core", "fold"])
def test_an_input_that_needs_no_gradient_gets_none_but_the_bank_does(method: str) -> None:
    rows = upload_rows([0, 1], CPU)
    x, weight = draw(1, 2, LENGTH, D_IN), draw(2, D_OUT, D_IN)
    basis = torch.linalg.qr(draw(4, D_OUT, RANK)).Q
    shape = (2, RANK, RANK) if method == "core" else (2, RANK, D_OUT)
    bank, grads = draw(5, *shape).requires_grad_(), torch.zeros(shape)
    if method == "core":
        y = core_linear(x, bank, grads, weight, basis, basis.T @ weight, rows, 1.0)
    else:
        y = fold_linear(x, bank, grads, weight, rows)
    y.square().sum().backward()
    assert x.grad is None
    assert bank.grad is None
    assert (grads != 0).all()


@pytest.mark.parametrize("method", ["core", "fold"])
def test_a_row_that_is_not_finite_reaches_no_other_lane(method: str) -> None:
    rows = upload_rows([0, 1], CPU)
    weight, basis = draw(2, D_OUT, D_IN), torch.linalg.qr(draw(4, D_OUT, RANK)).Q
    shape = (2, RANK, RANK) if method == "core" else (2, RANK, D_OUT)

    def gradient(x: Tensor) -> Tensor:
        bank, grads = draw(5, *shape).requires_grad_(), torch.zeros(shape)
        if method == "core":
            y = core_linear(x, bank, grads, weight, basis, basis.T @ weight, rows, 1.0)
        else:
            y = fold_linear(x, bank, grads, weight, rows)
        y.square().sum().backward()
        return grads

    x = draw(1, 2, LENGTH, D_IN)
    whole = gradient(x.clone())
    x[0] = float("inf")
    broken = gradient(x)
    assert torch.equal(broken[1], whole[1])
    assert not torch.isfinite(broken[0]).all()
