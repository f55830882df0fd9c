"""add_residual: the kernel equals the reference, and the reference equals arithmetic by hand.

On a CPU the kernel runs in Triton's interpreter; with SHOAL_TEST_GPU=1 on a GPU, compiled.
"""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shoal.kernels.add_residual.cases import CASES, Case, Inputs, make_inputs
from shoal.kernels.add_residual.kernel import (
    add_residual,
    default_config,
    launch_add_residual,
)
from shoal.kernels.add_residual.reference import add_residual_reference
from shoal.kernels.core_apply.epilogue_cases import defined_deltas
from shoal.kernels.errors import ShapeError
from shoal.kernels.launching import TileConfig
from shoal.kernels.testing import assert_close

ON_GPU = "SHOAL_TEST_GPU" in os.environ
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
RUNNABLE = [case for case in CASES if ON_GPU or not case.gpu_only]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BY_NAME = {case.name: case for case in CASES}


def launch(inputs: Inputs, config: TileConfig | None = None) -> tuple[Tensor, Tensor]:
    residual, delta, weight, bias, core = inputs
    return launch_add_residual(residual, delta, weight, bias=bias, core=core, config=config)


def reference(inputs: Inputs, part: int) -> tuple[Tensor, Tensor, Tensor]:
    """Residual, x and sums, from a residual of its own."""
    residual = inputs.residual.clone()
    return residual, *add_residual_reference(residual, *inputs[1:], part)


def test_reference_equals_a_case_worked_by_hand() -> None:
    residual = torch.tensor([[1.0, 1.0]])
    delta = torch.tensor([[2.0, 3.0, 99.0]])  # the third column is not looked at
    x, sums = add_residual(
        residual, delta, torch.tensor([1.0, 2.0]), bias=torch.tensor([1.0, -1.0])
    )
    assert residual.tolist() == [[4.0, 3.0]]
    assert x.tolist() == [[4.0, 6.0]]
    assert sums.tolist() == [[25.0]]
    x, sums = add_residual(residual, None, torch.tensor([1.0, 1.0]))
    assert residual.tolist() == x.tolist() == [[4.0, 3.0]]
    assert sums.tolist() == [[25.0]]


@pytest.mark.parametrize("name", [case.name for case in CASES if case.core and not case.gpu_only])
def test_reference_equals_the_definition_in_float64(name: str) -> None:
    inputs = make_inputs(BY_NAME[name], torch.float32, DEVICE, seed=1)
    n = inputs.residual.shape[1]
    assert inputs.core is not None
    assert inputs.delta is not None
    residual = inputs.residual.double() + inputs.delta[:, :n]
    residual += defined_deltas(inputs.delta, inputs.core, (n,))
    residual += 0.0 if inputs.bias is None else inputs.bias
    x, sums = add_residual(*inputs[:3], bias=inputs.bias, core=inputs.core)
    assert_close(inputs.residual, residual, torch.float32)
    assert_close(x, residual * inputs.weight.double(), torch.float32)
    assert_close(sums.sum(0), residual.square().sum(1), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", RUNNABLE, ids=lambda c: c.name)
def test_kernel_equals_reference(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype, DEVICE, seed=2)
    part = default_config(case.tokens, case.n, inputs.core).block_n
    residual, expected_x, expected_sums = reference(inputs, part)
    x, sums = launch(inputs)
    assert x.dtype == dtype
    assert sums.shape == (-(-case.n // part), case.tokens)
    assert_close(inputs.residual, residual, dtype, case.slack)
    assert_close(x, expected_x, dtype, case.slack)
    assert_close(sums, expected_sums, dtype, case.slack)


# (The interpreter cuts float32 to bfloat16 where a GPU and torch round.)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if ON_GPU else [torch.float16])
def test_squares_and_x_are_those_of_the_residual_as_stored(dtype: torch.dtype) -> None:
    inputs = make_inputs(BY_NAME["mixed ranks, core"], dtype, DEVICE, seed=3)
    x, sums = launch(inputs)
    stored = inputs.residual.double()
    assert_close(sums.sum(0), stored.square().sum(1), torch.float32)
    assert torch.equal(x, (inputs.residual.float() * inputs.weight).to(dtype))


def test_the_same_call_gives_the_same_bits() -> None:
    inputs = make_inputs(BY_NAME["mixed ranks, core"], torch.float16, DEVICE, seed=3)
    again = inputs._replace(residual=inputs.residual.clone())
    for one, other in zip(launch(inputs), launch(again), strict=True):
        assert torch.equal(one, other)


def test_a_token_without_adapter_is_what_it_is_without_adapters() -> None:
    inputs = make_inputs(BY_NAME["shared columns, core"], torch.float16, DEVICE, seed=3)
    bare = torch.arange(18) % 4 == 0
    without = launch(inputs._replace(core=None, residual=inputs.residual.clone()))[0]
    with_core = launch(inputs)[0]
    assert torch.equal(with_core[bare], without[bare])
    assert not torch.equal(with_core[~bare], without[~bare])


def test_results_go_where_the_caller_says() -> None:
    inputs = make_inputs(BY_NAME["already mixed, core"], torch.float16, DEVICE, seed=4)
    _, expected_x, expected_sums = reference(inputs, 128)
    out = torch.empty((19, 300), dtype=torch.float32, device=DEVICE)
    sums = torch.empty((3, 19), device=DEVICE)
    residual, delta, weight, bias, core = inputs
    found = launch_add_residual(residual, delta, weight, bias=bias, core=core, out=out, sums=sums)
    assert found[0] is out
    assert found[1] is sums
    assert_close(out, expected_x, torch.float16)
    assert_close(sums, expected_sums, torch.float16)


def test_parts_may_be_of_other_widths() -> None:
    inputs = make_inputs(BY_NAME["mixed ranks, core"], torch.float32, DEVICE, seed=5)
    _, expected_x, expected_sums = reference(inputs, 64)
    x, sums = launch(inputs, TileConfig(32, 64, 8))
    assert_close(x, expected_x, torch.float32)
    assert_close(sums, expected_sums, torch.float32)


def test_there_are_at_most_32_parts() -> None:
    core = make_inputs(BY_NAME["already mixed, core"], torch.float32, DEVICE, seed=5).core
    assert all(
        n <= 32 * default_config(tokens, n, chosen).block_n
        for tokens in (1, 256, 2048)
        for n in (576, 4096, 8192)
        for chosen in (None, core)
    )


def fail_delta(i: Inputs) -> Inputs:
    assert i.delta is not None
    return i._replace(delta=i.delta[:, :-1])


def fail_weight(i: Inputs) -> Inputs:
    return i._replace(weight=i.weight[:-1])


def fail_bias(i: Inputs) -> Inputs:
    return i._replace(bias=i.weight[:-1])


def fail_core(i: Inputs) -> Inputs:
    return i._replace(delta=None, bias=None)


@pytest.mark.parametrize("spoil", [fail_delta, fail_weight, fail_bias, fail_core])
def test_a_wrong_argument_is_named(spoil: Callable[[Inputs], Inputs]) -> None:
    inputs = make_inputs(BY_NAME["mixed ranks, core"], torch.float32, DEVICE, seed=6)
    with pytest.raises(ShapeError) as caught:
        launch(spoil(inputs))
    assert caught.value.argument == spoil.__name__.removeprefix("fail_")
