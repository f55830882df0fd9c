"""The fleet's linears: forward, input gradient and bank gradient equal autograd of the formula."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.adapters.training.fleet.products import Frozen, core_linears, fold_linears
from shoal.kernels.lane_rows import LaneRows, upload_rows

CPU = torch.device("cpu")
# Rows of five lanes: unequal numbers, an unused row, two lanes without any.
OWNERS = {"ragged": [3, 3, 0, -1, 1], "equal": [2, 2, 4, 4], "one": [1]}
LANES, LENGTH, D_IN, D_OUT, RANK = 5, 7, 22, 13, 4


def core_linear(
    x: Tensor,
    cores: Tensor,
    grads: Tensor,
    weight: Tensor,
    basis: Tensor,
    down: Tensor,
    rows: LaneRows,
    scale: float,
) -> Tensor:
    """One linear alone."""
    linears = [Frozen(weight, None, basis)]
    [y] = core_linears(x, cores[:, None], grads[:, None], down, linears, rows, scale)
    return y


def fold_linear(x: Tensor, bank: Tensor, grads: Tensor, weight: Tensor, rows: LaneRows) -> Tensor:
    """One linear alone."""
    [y] = fold_linears(x, [bank], [grads], [Frozen(weight)], rows)
    return y


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


@pytest.mark.parametrize("method", ["core", "fold"])
@pytest.mark.parametrize("used", [(0, 1, 2), (0, 2), (1,)], ids=str)
def test_linears_with_one_input_are_those_linears_one_by_one(
    method: str, used: tuple[int, ...]
) -> None:
    """Also when some outputs are not used: their gradients stay as another call left them."""
    rows = upload_rows([1, 1, 0], CPU)
    widths = (13, 8, 13)
    linears = [
        Frozen(draw(i, d, D_IN), draw(9 + i, d), torch.linalg.qr(draw(20 + i, d, RANK)).Q)
        for i, d in enumerate(widths)
    ]
    x, other = (draw(30, 3, LENGTH, D_IN).requires_grad_() for _ in range(2))
    if method == "core":
        bank = draw(31, 2, 3, RANK, RANK).requires_grad_()
        grads = torch.full(bank.shape, 7.0)
        bases = [linear.basis for linear in linears if linear.basis is not None]
        down = [b.T @ linear.weight for b, linear in zip(bases, linears, strict=True)]
        outs = core_linears(x, bank, grads, torch.cat(down), linears, rows, 0.5)
        parts = [grads[:, i] for i in range(3)]
    else:
        blocks = [draw(31 + i, 2, RANK, d).requires_grad_() for i, d in enumerate(widths)]
        parts = [torch.full(block.shape, 7.0) for block in blocks]
        outs = fold_linears(x, blocks, parts, linears, rows)
    sum(outs[i].square().sum() for i in used).backward()  # type: ignore[union-attr]
    for i, linear in enumerate(linears):
        alone = torch.full(parts[i].shape, 7.0)
        if method == "core":
            assert linear.basis is not None
            y = core_linear(
                other, bank[:, i], alone, linear.weight, linear.basis, down[i], rows, 0.5
            )
        else:
            y = fold_linear(other, blocks[i], alone, linear.weight, rows)
        y = y + linear.bias
        torch.testing.assert_close(outs[i], y, atol=1e-5, rtol=1e-5)
        if i in used:
            y.square().sum().backward(retain_graph=True)
        torch.testing.assert_close(parts[i], alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(x.grad, other.grad, atol=1e-4, rtol=1e-4)
