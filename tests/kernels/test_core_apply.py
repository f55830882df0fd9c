"""core_apply: the kernel equals the reference, and the reference equals arithmetic by hand.

On a CPU the kernel runs in Triton's interpreter; with SHOAL_TEST_GPU=1 on a GPU, compiled.
"""

import os
from collections.abc import Callable

import pytest
import torch

from shoal.kernels.core_apply.cases import CASES, Case, Inputs, make_inputs
from shoal.kernels.core_apply.kernel import (
    FUSED_RANK_MAX,
    CoreConfig,
    core_apply,
    launch_core_apply,
)
from shoal.kernels.core_apply.reference import core_apply_reference
from shoal.kernels.errors import ShapeError
from shoal.kernels.testing import assert_close

ON_GPU = "SHOAL_TEST_GPU" in os.environ
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
RUNNABLE = [case for case in CASES if ON_GPU or not case.gpu_only]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def loop_in_float64(inputs: Inputs) -> torch.Tensor:
    """The definition, token by token."""
    y = inputs.y.double().cpu().clone()
    for t, address in enumerate(inputs.addresses.tolist()):
        if address < 0:
            continue
        rank = int(inputs.ranks[t])
        r = inputs.arena[address : address + rank * rank].double().cpu().view(rank, rank)
        y[t] += inputs.basis.double().cpu()[:, :rank] @ (r @ inputs.h.double().cpu()[t, :rank])
    return y


def test_reference_equals_a_case_worked_by_hand() -> None:
    y = torch.tensor([[10.0, 20.0, 30.0], [1.0, 2.0, 3.0]])
    h = torch.tensor([[1.0, 2.0], [5.0, 5.0]])
    arena = torch.tensor([9.0, 1.0, 2.0, 3.0, 4.0, 9.0])  # R = [[1, 2], [3, 4]] at address 1
    basis = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]])
    addresses, ranks = torch.tensor([1, -1]), torch.tensor([2, 2], dtype=torch.int32)
    core_apply_reference(y, h, arena, addresses, ranks, basis)
    # R h = (1·1 + 2·2, 3·1 + 4·2) = (5, 11); B (5, 11) = (5, 11, -6)
    assert y.tolist() == [[15.0, 31.0, 24.0], [1.0, 2.0, 3.0]]


@pytest.mark.parametrize("case", [c for c in CASES if not c.gpu_only], ids=lambda c: c.name)
def test_reference_equals_the_definition_in_float64(case: Case) -> None:
    inputs = make_inputs(case, torch.float32, DEVICE, seed=1)
    expected = loop_in_float64(inputs)
    core_apply_reference(*inputs)
    assert_close(inputs.y.cpu(), expected, torch.float32)


LAUNCHES = [
    pytest.param(case, method, id=f"{case.name}-{method}")
    for case in RUNNABLE
    for method in ("fused", "two_step")
    if method == "two_step" or case.columns <= FUSED_RANK_MAX
]


def test_fused_is_refused_for_ranks_that_take_minutes_to_compile() -> None:
    inputs = make_inputs(next(c for c in RUNNABLE if c.name == "large ranks"), DTYPES[0], DEVICE, 2)
    before = inputs.y.clone()
    with pytest.raises(ShapeError, match="at most 64 with method fused"):
        launch_core_apply(*inputs, config=CoreConfig(block_n=128))
    assert torch.equal(inputs.y, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "method"), LAUNCHES)
def test_kernel_equals_reference(case: Case, dtype: torch.dtype, method: str) -> None:
    if method == "two_step":
        config = CoreConfig(method="two_step", tile=4)
    else:
        config = CoreConfig(block_n=128)
    inputs = make_inputs(case, dtype, DEVICE, seed=2)
    expected = inputs._replace(y=inputs.y.clone())
    core_apply_reference(*expected)
    launch_core_apply(*inputs, alignment=case.alignment, config=config)
    assert_close(inputs.y, expected.y, dtype, case.slack)


def test_rows_without_adapter_keep_every_bit() -> None:
    inputs = make_inputs(RUNNABLE[4], torch.float16, DEVICE, seed=3)
    bare = inputs.addresses < 0
    inputs.y[bare, ::2] = -0.0  # adding a zero would turn it into +0.0
    before = inputs.y.clone()
    launch_core_apply(*inputs)
    assert bare.any()
    assert torch.equal(inputs.y[bare].view(torch.int16), before[bare].view(torch.int16))
    assert not torch.equal(inputs.y[~bare], before[~bare])


def test_public_entry_runs_on_any_device() -> None:
    inputs = make_inputs(RUNNABLE[5], torch.float32, DEVICE, seed=4)
    expected = loop_in_float64(inputs)
    core_apply(*inputs)
    assert_close(inputs.y.cpu(), expected, torch.float32)


def fail_h(i: Inputs) -> Inputs:
    return i._replace(h=i.h[:, :-1])


def fail_basis(i: Inputs) -> Inputs:
    return i._replace(basis=i.basis.t().contiguous().t())


def fail_addresses(i: Inputs) -> Inputs:
    return i._replace(addresses=i.addresses.int())


def fail_ranks(i: Inputs) -> Inputs:
    return i._replace(ranks=i.ranks[:-1])


def fail_arena(i: Inputs) -> Inputs:
    return i._replace(arena=i.arena.double())


@pytest.mark.parametrize("spoil", [fail_h, fail_basis, fail_addresses, fail_ranks, fail_arena])
def test_a_wrong_argument_is_named(spoil: Callable[[Inputs], Inputs]) -> None:
    inputs = make_inputs(RUNNABLE[4], torch.float32, DEVICE, seed=5)
    with pytest.raises(ShapeError) as caught:
        core_apply(*spoil(inputs))
    assert caught.value.argument == spoil.__name__.removeprefix("fail_")


def test_a_rank_bound_beyond_the_basis_is_refused() -> None:
    inputs = make_inputs(RUNNABLE[4], torch.float32, DEVICE, seed=6)
    with pytest.raises(ShapeError, match="max_rank: expected 1 to min"):
        core_apply(*inputs, max_rank=17)
