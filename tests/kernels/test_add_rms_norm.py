"""add_rms_norm: the kernel equals the reference, and the reference equals arithmetic by hand.

On a CPU the kernel runs in Triton's interpreter; with SHOAL_TEST_GPU=1 on a GPU, compiled.
"""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shoal.kernels.add_rms_norm.cases import CASES, Case, Inputs, make_inputs
from shoal.kernels.add_rms_norm.kernel import NormConfig, add_rms_norm, launch_add_rms_norm
from shoal.kernels.add_rms_norm.reference import add_rms_norm_reference
from shoal.kernels.errors import ShapeError
from shoal.kernels.testing import assert_close

ON_GPU = "SHOAL_TEST_GPU" in os.environ
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
RUNNABLE = [case for case in CASES if ON_GPU or not case.gpu_only]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BY_NAME = {case.name: case for case in CASES}


def launch(inputs: Inputs, config: NormConfig | None = None) -> Tensor:
    residual, weight, eps, delta, branch, bias, delta_weight, plus_one = inputs
    return launch_add_rms_norm(
        residual,
        weight,
        eps,
        delta=delta,
        branch=branch,
        bias=bias,
        delta_weight=delta_weight,
        plus_one=plus_one,
        config=config,
    )


def own_residual(inputs: Inputs) -> Inputs:
    """The same inputs with a residual that may be written."""
    return inputs._replace(residual=inputs.residual.clone())


def test_reference_equals_a_case_worked_by_hand() -> None:
    residual = torch.tensor([[1.0, 1.0]])
    delta = torch.tensor([[2.0, 3.0, 99.0]])  # the third column is not looked at
    out = add_rms_norm(residual, torch.tensor([1.0, 2.0]), 0.5, delta=delta)
    assert residual.tolist() == [[3.0, 4.0]]
    root = 13.0**0.5  # mean square 12.5, plus 0.5
    assert out.tolist() == [[pytest.approx(3.0 / root), pytest.approx(8.0 / root)]]


def test_reference_equals_the_definition_in_float64() -> None:
    inputs = make_inputs(BY_NAME["everything"], torch.float32, DEVICE, seed=1)
    assert inputs.delta is not None
    assert inputs.delta_weight is not None
    added = inputs.delta.double() + inputs.branch + inputs.bias

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(1, keepdim=True) + inputs.eps).sqrt() * weight.double()

    residual = inputs.residual.double() + norm(added, inputs.delta_weight)
    out = add_rms_norm_reference(*inputs)
    assert_close(inputs.residual, residual, torch.float32)
    assert_close(out, norm(residual, inputs.weight), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", RUNNABLE, ids=lambda c: c.name)
def test_kernel_equals_reference(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype, DEVICE, seed=2)
    expected = own_residual(inputs)
    expected_out = add_rms_norm_reference(*expected)
    out = launch(inputs)
    assert out.dtype == dtype
    assert_close(inputs.residual, expected.residual, dtype, case.slack)
    assert_close(out, expected_out, dtype, case.slack)


def test_a_float32_residual_takes_16_bit_deltas() -> None:
    inputs = make_inputs(BY_NAME["everything"], torch.float16, DEVICE, seed=4)
    inputs = inputs._replace(residual=inputs.residual.float())
    expected = own_residual(inputs)
    expected_out = add_rms_norm_reference(*expected)
    out = launch(inputs, NormConfig(num_warps=2))
    assert out.dtype == torch.float32
    assert_close(out, expected_out, torch.float32)
    assert_close(inputs.residual, expected.residual, torch.float32)


def fail_delta(i: Inputs) -> Inputs:
    assert i.delta is not None
    return i._replace(delta=i.delta[:, :-1])


def fail_weight(i: Inputs) -> Inputs:
    return i._replace(weight=i.weight[:-1])


def fail_branch(i: Inputs) -> Inputs:
    return i._replace(branch=i.residual[:-1])


def fail_bias(i: Inputs) -> Inputs:
    return i._replace(delta=None, branch=None, delta_weight=None)


def fail_delta_weight(i: Inputs) -> Inputs:
    return i._replace(delta_weight=i.weight.double())


@pytest.mark.parametrize(
    "spoil", [fail_delta, fail_weight, fail_branch, fail_bias, fail_delta_weight]
)
def test_a_wrong_argument_is_named(spoil: Callable[[Inputs], Inputs]) -> None:
    inputs = make_inputs(BY_NAME["everything"], torch.float32, DEVICE, seed=6)
    with pytest.raises(ShapeError) as caught:
        launch(spoil(inputs))
    assert caught.value.argument == spoil.__name__.removeprefix("fail_")
