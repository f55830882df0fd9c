"""silu_mul: the kernel equals the reference, and the reference equals arithmetic by hand.

On a CPU the kernel runs in Triton's interpreter; with SHOAL_TEST_GPU=1 on a GPU, compiled.
"""

import math
import os
from collections.abc import Callable

import pytest
import torch

from shoal.kernels.core_apply.epilogue import CoreEpilogue
from shoal.kernels.core_apply.epilogue_cases import defined_deltas
from shoal.kernels.errors import ShapeError
from shoal.kernels.launching import TileConfig
from shoal.kernels.silu_mul.cases import CASES, Case, Inputs, make_inputs
from shoal.kernels.silu_mul.kernel import default_config, launch_silu_mul, silu_mul
from shoal.kernels.silu_mul.reference import silu_mul_reference
from shoal.kernels.testing import assert_close

ON_GPU = "SHOAL_TEST_GPU" in os.environ
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
RUNNABLE = [case for case in CASES if ON_GPU or not case.gpu_only]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BY_NAME = {case.name: case for case in CASES}


def launch(inputs: Inputs, config: TileConfig | None = None) -> torch.Tensor:
    gate_up, width, activation, bias, core, scale = inputs
    return launch_silu_mul(
        gate_up, width, activation=activation, bias=bias, core=core, scale=scale, config=config
    )


def test_reference_equals_a_case_worked_by_hand() -> None:
    gate_up = torch.tensor([[0.0, math.log(3.0), 5.0, 4.0, 99.0]])
    # sigmoid(log 3) = 3/4; the fifth column is not looked at
    out = silu_mul_reference(gate_up, 2)
    assert out.tolist() == [[0.0, pytest.approx(math.log(3.0) * 0.75 * 4.0)]]


@pytest.mark.parametrize("name", [case.name for case in CASES if case.core and not case.gpu_only])
def test_reference_equals_the_definition_in_float64(name: str) -> None:
    inputs = make_inputs(BY_NAME[name], torch.float32, DEVICE, seed=1)
    gate_up, width, activation, bias, core, scale = inputs
    assert core is not None
    before = gate_up.clone()
    y = gate_up[:, : 2 * width].double() + defined_deltas(gate_up, core, (width, width))
    if scale is not None:
        y = y / (scale.sums.double().sum(0) / scale.width + scale.eps).sqrt()[:, None]
    if bias is not None:
        y = y + bias
    gate, up = y.split(width, dim=1)
    if activation == "silu":
        expected = gate / (1 + torch.exp(-gate)) * up
    else:
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        expected = gate * (1 + torch.tanh(inner)) / 2 * up
    actual = silu_mul(gate_up, width, activation=activation, bias=bias, core=core, scale=scale)
    assert_close(actual, expected, torch.float32)
    assert torch.equal(gate_up.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", RUNNABLE, ids=lambda c: c.name)
def test_kernel_equals_reference(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype, DEVICE, seed=2)
    actual = launch(inputs)
    assert actual.dtype == dtype
    assert_close(actual, silu_mul_reference(*inputs), dtype, case.slack)


def test_a_token_without_adapter_is_what_it_is_without_adapters() -> None:
    inputs = make_inputs(BY_NAME["mixed ranks, core"], torch.float16, DEVICE, seed=3)
    assert isinstance(inputs.core, CoreEpilogue)
    bare = inputs.core.rows.addresses < 0
    with_core, without = launch(inputs), launch(inputs._replace(core=None))
    assert torch.equal(with_core[bare], without[bare])
    assert not torch.equal(with_core[~bare], without[~bare])


def test_launch_parameters_may_differ() -> None:
    inputs = make_inputs(BY_NAME["mixed ranks, core"], torch.float32, DEVICE, seed=4)
    expected = silu_mul_reference(*inputs)
    for config in (TileConfig(16, 64, 4), TileConfig(32, 16, 8)):
        assert_close(launch(inputs, config), expected, torch.float32)


def test_prompts_take_larger_tiles_once_u_is_made() -> None:
    made = make_inputs(BY_NAME["already mixed, core"], torch.float32, DEVICE, seed=4).core
    assert default_config(made, 2048).tile > default_config(made, 64).tile == 16


def fail_width(i: Inputs) -> Inputs:
    return i._replace(width=i.gate_up.shape[1])


def fail_gate_up(i: Inputs) -> Inputs:
    return i._replace(gate_up=i.gate_up[:, :-1])


def fail_bias(i: Inputs) -> Inputs:
    return i._replace(bias=torch.zeros(3, device=DEVICE))


@pytest.mark.parametrize("spoil", [fail_width, fail_gate_up, fail_bias])
def test_a_wrong_argument_is_named(spoil: Callable[[Inputs], Inputs]) -> None:
    inputs = make_inputs(BY_NAME["mixed ranks, core"], torch.float32, DEVICE, seed=5)
    with pytest.raises(ShapeError) as caught:
        launch(spoil(inputs))
    assert caught.value.argument == spoil.__name__.removeprefix("fail_")
