"""scale_outputs: the kernel equals the reference, and the reference equals arithmetic by hand.

On a CPU the kernel runs in Triton's interpreter; with SHOAL_TEST_GPU=1 on a GPU, compiled.
"""

import os
from collections.abc import Callable

import pytest
import torch

from shoal.kernels.errors import ShapeError
from shoal.kernels.scale_outputs.cases import CASES, Case, Inputs, make_inputs
from shoal.kernels.scale_outputs.kernel import ScaleConfig, launch_scale_outputs, scale_outputs
from shoal.kernels.scale_outputs.reference import scale_outputs_reference
from shoal.kernels.testing import assert_close

ON_GPU = "SHOAL_TEST_GPU" in os.environ
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
RUNNABLE = [case for case in CASES if ON_GPU or not case.gpu_only]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BY_NAME = {case.name: case for case in CASES}


def launch(inputs: Inputs, config: ScaleConfig | None = None) -> None:
    y, arena, addresses, offset, alignment = inputs
    launch_scale_outputs(y, arena, addresses, offset=offset, alignment=alignment, config=config)


def test_reference_equals_a_case_worked_by_hand() -> None:
    y = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])[:, :2]
    arena = torch.tensor([9.0, 0.5, -0.5, 9.0, 0.0, 1.0])
    scale_outputs(y, arena, torch.tensor([0, -1, 3]), offset=1)
    assert y.tolist() == [[1.5, 1.0], [1.0, 2.0], [1.0, 4.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", RUNNABLE, ids=lambda c: c.name)
def test_kernel_equals_reference(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype, DEVICE, seed=2)
    before, expected = inputs.y.clone(), inputs.y.clone()
    scale_outputs_reference(expected, *inputs[1:4])
    launch(inputs, ScaleConfig(block_n=256))
    assert_close(inputs.y, expected, dtype)
    without = inputs.addresses < 0
    assert torch.equal(inputs.y[without], before[without])
    if case.tokens and not bool(without.all()):
        assert not torch.equal(inputs.y[~without], before[~without])


def test_each_array_may_have_its_own_dtype() -> None:
    inputs = make_inputs(BY_NAME["mixed"], torch.float32, DEVICE, seed=3)
    inputs = inputs._replace(arena=inputs.arena.half())
    expected = inputs.y.double()
    for row, address in zip(expected, inputs.addresses.tolist(), strict=True):
        if address >= 0:
            start = address + inputs.offset
            row *= 1 + inputs.arena[start : start + len(row)].double()
    launch(inputs)
    assert_close(inputs.y, expected, torch.float32)


def fail_y(i: Inputs) -> Inputs:
    return i._replace(y=i.y.double())


def fail_arena(i: Inputs) -> Inputs:
    return i._replace(arena=i.arena[::2])


def fail_addresses(i: Inputs) -> Inputs:
    return i._replace(addresses=i.addresses[:-1])


def fail_offset(i: Inputs) -> Inputs:
    return i._replace(offset=-1)


def fail_alignment(i: Inputs) -> Inputs:
    return i._replace(alignment=3)


@pytest.mark.parametrize("spoil", [fail_y, fail_arena, fail_addresses, fail_offset, fail_alignment])
def test_a_wrong_argument_is_named(spoil: Callable[[Inputs], Inputs]) -> None:
    inputs = make_inputs(BY_NAME["mixed"], torch.float32, DEVICE, seed=6)
    with pytest.raises(ShapeError) as caught:
        launch(spoil(inputs))
    assert caught.value.argument == spoil.__name__.removeprefix("fail_")
