"""The parts of methods that have a formula of their own."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.adapters.training.method_cases import Trial, fresh
from torch import Tensor, nn

from shoal.adapters.spec import MODULES, Target
from shoal.adapters.spectral_basis import thin_svd
from shoal.adapters.training.methods.adalora import Adalora, AdaloraLinear
from shoal.adapters.training.methods.contract import AdaptedLinear
from shoal.adapters.training.methods.dora import DoraLinear
from shoal.adapters.training.methods.lora_xs import CoreLinear
from shoal.adapters.training.methods.miss import ShardLinear
from shoal.adapters.training.methods.residual import ResidualLinear
from shoal.adapters.training.methods.source import leading_columns
from shoal.adapters.training.methods.svft import places

TARGET = Target(0, "q_proj")


def linear_with_bias(d_in: int = 10, d_out: int = 6) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(d_in, d_out).double().requires_grad_(False)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def randomised(adapted: AdaptedLinear) -> AdaptedLinear:
    for parameter in adapted.factors().values():
        nn.init.normal_(parameter)
    return adapted.double()


@pytest.mark.parametrize("with_sigma", [True, False])
def test_the_gradients_of_lora_xs_are_those_of_its_formula(with_sigma: bool) -> None:
    linear = linear_with_bias()
    basis = torch.linalg.qr(drawn(6, 3)).Q
    adapted = CoreLinear(linear, basis, torch.zeros(2, 3, 3), 0.5, with_sigma=with_sigma).double()
    randomised(adapted)
    a = basis.T @ linear.weight
    if not with_sigma:
        a = a / a.norm(dim=1, keepdim=True)
    x = drawn(4, 5, 10).requires_grad_()
    by_hand = torch.cat(
        [
            x[2 * lane : 2 * lane + 2] @ (linear.weight + 0.5 * basis @ core @ a).T + linear.bias
            for lane, core in enumerate(adapted.core)
        ]
    )
    wanted = torch.autograd.grad(by_hand.square().sum(), [x, adapted.core])
    got = adapted(x)
    torch.testing.assert_close(got, by_hand)
    for mine, his in zip(
        torch.autograd.grad(got.square().sum(), [x, adapted.core]), wanted, strict=True
    ):
        torch.testing.assert_close(mine, his)


def test_lora_xs_keeps_neither_input_nor_output_for_the_backward_pass() -> None:
    adapted = CoreLinear(linear_with_bias().float(), torch.eye(6)[:, :2], torch.zeros(1, 2, 2), 1.0)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adapted(torch.randn(3, 7, 10, requires_grad=True))
    assert [t.shape for t in kept if t.shape[0] == 21] == [(21, 2)]


def kept_bytes(model: Any, ids: Tensor) -> int:
    """What a forward pass keeps for the backward pass beside the model, each storage once."""
    resident = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum()
    loss.backward()
    sizes = {at: tensor.untyped_storage().nbytes() for at, tensor in kept.items()}
    return sum(size for at, size in sizes.items() if at not in resident)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers by an old name
def test_a_step_of_lora_xs_keeps_less_than_one_of_pefts_lora(base: Path, tmp_path: Path) -> None:
    ids = torch.randint(3, 200, (4, 32))
    config = LoraConfig(r=4, target_modules=list(MODULES))
    theirs = kept_bytes(get_peft_model(fresh(base), config), ids)
    ours = kept_bytes(Trial(base, tmp_path, "lora-xs official").model, ids)
    assert ours < 0.9 * theirs


def test_dora_scales_rows_to_their_magnitude() -> None:
    linear = linear_with_bias()
    adapted = randomised(DoraLinear(linear, drawn(1, 3, 10), drawn(1, 6, 3), 2.0))
    a, b, m = (factor[0] for factor in adapted.factors().values())
    whole = linear.weight + 2.0 * b @ a
    x = drawn(2, 5, 10)
    expected = x @ (m[:, None] * whole / whole.norm(dim=1, keepdim=True)).T + linear.bias
    # The norms of W's rows are kept in float32.
    torch.testing.assert_close(adapted(x), expected, atol=1e-6, rtol=1e-6)


def test_miss_by_output_repeats_rows() -> None:
    linear = linear_with_bias()
    adapted = randomised(ShardLinear(linear, 4, 1))
    x = drawn(2, 5, 10)
    d = adapted.d[0][[0, 0, 1, 1, 2, 3]]  # type: ignore[index, union-attr]
    torch.testing.assert_close(adapted(x), x @ (linear.weight + d).T + linear.bias)


def test_what_pissa_takes_out_is_what_it_starts_as() -> None:
    linear = linear_with_bias()
    weight = linear.weight.clone()
    u, sigma, vt = torch.linalg.svd(weight, full_matrices=False)
    adapted = ResidualLinear(linear, u[:, :2], 4.0, 1)
    torch.testing.assert_close(linear.weight.data, (u[:, 2:] * sigma[2:]) @ vt[2:])
    a, b = (factor[0].double() for factor in adapted.factors().values())
    torch.testing.assert_close(linear.weight + 4.0 * b @ a, weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))


def test_the_randomised_svd_finds_the_leading_subspace_and_repeats_itself() -> None:
    torch.manual_seed(3)
    weight = torch.randn(60, 90) @ torch.diag(0.93 ** torch.arange(90.0))
    found = leading_columns(weight, TARGET, 8)
    exact = torch.linalg.svd(weight).U[:, :8]
    assert torch.equal(found, leading_columns(weight, TARGET, 8))
    torch.testing.assert_close(found.T @ found, torch.eye(8))
    assert (exact.T @ found).square().sum() > 8 * 0.999
    # Column by column, from the largest on.
    kept = (found.T @ weight).norm(dim=1)
    assert torch.equal(kept, kept.sort(descending=True).values)


def test_what_is_computed_of_a_base_is_kept_for_its_next_run(base: Path, tmp_path: Path) -> None:
    Trial(base, tmp_path, "pissa")
    Trial(base, tmp_path, "milora")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {path.name.split("-")[0] for path in before} == {"randomised", "trailing"}
    Trial(base, tmp_path, "pissa")
    [(damaged)] = tmp_path.glob("trailing-*")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    Trial(base, tmp_path, "milora")
    after = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {path for path in after if after[path] != before[path]} == {damaged}


@pytest.mark.parametrize(
    ("pattern", "width", "count"), [("banded", 0, 6), ("banded", 2, 24), ("random", 2, 24)]
)
def test_svft_trains_as_many_entries_as_its_pattern_has(
    pattern: str, width: int, count: int
) -> None:
    svd = thin_svd(linear_with_bias().weight, TARGET)
    place = places(pattern, width, svd, torch.Generator().manual_seed(0))
    assert len(set(place.tolist())) == len(place) == count
    assert place.tolist() == sorted(place.tolist())
    if pattern == "banded":
        assert max(abs(p // 6 - p % 6) for p in place.tolist()) == width


def adalora(**options: float) -> Adalora:
    fields = {"rank": 2, "init_rank": 4, "alpha": 4.0, "steps": 100, "tinit": 10, "tfinal": 30}
    return Adalora(**(fields | options))  # type: ignore[arg-type]


def test_adalora_s_budget_falls_with_the_cube_of_the_time_left() -> None:
    method = adalora()
    budgets = [method.budget(step, 10) for step in range(1, 101)]
    assert budgets[:10] == [40] * 10
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[39] == int(20 + 20 * 0.5**3)
    assert budgets[69:] == [20] * 31


def test_adalora_keeps_what_matters_in_each_lane() -> None:
    method = adalora(steps=4, tinit=0, tfinal=1, delta_t=1)
    linears = [
        AdaloraLinear(linear_with_bias().float(), torch.ones(2, 4, 10), torch.ones(2, 6, 4), 1.0)
        for _ in range(2)
    ]
    adapted = {TARGET: linears[0], Target(1, "q_proj"): linears[1]}
    for step in range(1, 4):
        for number, linear in enumerate(linears):
            for factor in linear.factors().values():
                factor.grad = torch.zeros_like(factor)
            with torch.no_grad():
                linear.e.fill_(1.0)
            # In lane 0 all of the first linear matters, in lane 1 the last two of either.
            linear.e.grad[0] = 1.0 - number  # type: ignore[index]
            linear.e.grad[1, 2:] = 1.0  # type: ignore[index]
        method.before_step(adapted)
        method.after_step(adapted, step, 4)
    assert linears[0].kept.int().tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert linears[1].kept.int().tolist() == [[0, 0, 0, 0], [0, 0, 1, 1]]
    assert torch.equal(linears[0].e.detach(), linears[0].kept.float())
    with torch.no_grad():
        linears[1].e.fill_(1.0)
    method.after_step(adapted, 4, 4)
    assert torch.equal(linears[1].e.detach(), linears[1].kept.float())


def test_adalora_leaves_lanes_alone_that_are_not_active() -> None:
    method = adalora(steps=4, tinit=0, tfinal=1, delta_t=1)
    linear = AdaloraLinear(
        linear_with_bias().float(), torch.ones(2, 4, 10), torch.ones(2, 6, 4), 1.0
    )
    with torch.no_grad():
        linear.e.fill_(1.0)
    for step in (1, 2, 3, 4):
        method.after_step({TARGET: linear}, step, 4, torch.tensor([True, False]))
    assert linear.e.sum(dim=1).tolist() == [2.0, 4.0]
    assert linear.kept.sum(dim=1).tolist() == [2, 4]


def test_adalora_s_penalty_is_the_distance_from_orthonormal_factors() -> None:
    method = adalora(orthogonality=0.5)
    a = torch.linalg.qr(torch.randn(10, 4)).Q.T.repeat(2, 1, 1)
    a[1] *= 2
    b = torch.linalg.qr(torch.randn(6, 4)).Q.repeat(2, 1, 1)
    penalty = method.penalty({TARGET: AdaloraLinear(linear_with_bias().float(), a, b, 1.0)})
    assert penalty is not None
    # ‖4I − I‖ = 3·√4, over two matrices.
    expected = torch.tensor([0.0, 0.5 * 3 * math.sqrt(4) / 2])
    torch.testing.assert_close(penalty.detach(), expected, atol=1e-5, rtol=0)
