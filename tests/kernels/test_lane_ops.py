"""lane_matmul and lane_outer: the kernels equal the references, and those equal float64 by hand.

On a CPU the kernels run in Triton's interpreter; with SHOAL_TEST_GPU=1 on a GPU, compiled.
"""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.kernels.errors import ShapeError
from shoal.kernels.lane_matmul import cases as matmul_cases
from shoal.kernels.lane_matmul.kernel import LaneMatmulConfig, lane_matmul, launch_lane_matmul
from shoal.kernels.lane_outer import cases as outer_cases
from shoal.kernels.lane_outer.kernel import LaneOuterConfig, lane_outer, launch_lane_outer
from shoal.kernels.lane_outer.kernel import default_config as outer_config
from shoal.kernels.lane_rows import LaneRows, plan_rows, upload_rows
from shoal.kernels.testing import assert_close

ON_GPU = "SHOAL_TEST_GPU" in os.environ
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MATMULS = [case for case in matmul_cases.CASES if ON_GPU or not case.gpu_only]
OUTERS = [case for case in outer_cases.CASES if ON_GPU or not case.gpu_only]


def name(value: object) -> str:
    return str(getattr(value, "name", value))


def with_dtypes(cases: Any) -> list[tuple[Any, torch.dtype]]:
    """Every case in float32; in a slow interpreter, a few of them in the others."""
    few = cases if ON_GPU else [case for case in cases if case.padded][:2]
    return [(case, torch.float32) for case in cases] + [
        (case, dtype) for case in few for dtype in DTYPES[1:]
    ]


def to_cpu(rows: LaneRows) -> LaneRows:
    return LaneRows(*(part.cpu() for part in rows))


def matmul_in_float64(case: matmul_cases.Case, inputs: matmul_cases.Inputs) -> Tensor:
    """The definition, row by row."""
    out = inputs.out.double()
    for row, lane in enumerate(case.owners):
        if lane >= 0:
            for i in range(case.modules):
                x, matrix = inputs.x[row, :, i].double(), inputs.bank[lane, i].double()
                out[row, :, i] = case.scale * x @ matrix + (out[row, :, i] if case.add else 0)
        elif not case.add:
            out[row] = 0
    return out


def outer_in_float64(case: outer_cases.Case, inputs: outer_cases.Inputs) -> Tensor:
    """The definition, token by token."""
    grads = inputs.grads.double()
    for lane in set(case.owners) - {-1}:
        grads[lane] = 0
    for row, lane in enumerate(case.owners):
        if lane >= 0:
            for t in range(case.length):
                a, b = inputs.a[row, t].double(), inputs.b[row, t].double()
                grads[lane] += case.scale * a[:, :, None] * b[:, None, :]
    return grads


@pytest.mark.parametrize("case", [c for c in MATMULS if not c.gpu_only], ids=name)
def test_the_matmul_reference_equals_the_definition(case: matmul_cases.Case) -> None:
    inputs = matmul_cases.make_inputs(case, torch.float32, CPU, seed=1)
    expected = matmul_in_float64(case, inputs)
    lane_matmul(*inputs, scale=case.scale, add=case.add)
    assert_close(inputs.out, expected, torch.float32)


@pytest.mark.parametrize(("case", "dtype"), with_dtypes(MATMULS), ids=name)
def test_the_matmul_kernel_equals_the_reference(
    case: matmul_cases.Case, dtype: torch.dtype
) -> None:
    inputs = matmul_cases.make_inputs(case, dtype, DEVICE, seed=2)
    expected = inputs.out.cpu().clone()
    x, bank, owners = (tensor.cpu() for tensor in inputs[:3])
    lane_matmul(x, bank, owners, expected, scale=case.scale, add=case.add)
    odd = [LaneMatmulConfig(16, 32, 32)] if dtype == torch.float32 else []
    for config in (None, *odd):
        out = matmul_cases.make_inputs(case, dtype, DEVICE, seed=2).out
        launch_lane_matmul(*inputs[:3], out, scale=case.scale, add=case.add, config=config)
        assert_close(out.cpu(), expected, dtype, case.slack)


@pytest.mark.parametrize("case", [c for c in OUTERS if not c.gpu_only], ids=name)
def test_the_outer_reference_equals_the_definition(case: outer_cases.Case) -> None:
    inputs = outer_cases.make_inputs(case, (torch.float32, torch.float32), CPU, seed=1)
    expected = outer_in_float64(case, inputs)
    lane_outer(*inputs, scale=case.scale)
    assert_close(inputs.grads, expected, torch.float32)


@pytest.mark.parametrize(("case", "dtype"), with_dtypes(OUTERS), ids=name)
def test_the_outer_kernel_equals_the_reference(case: outer_cases.Case, dtype: torch.dtype) -> None:
    inputs = outer_cases.make_inputs(case, (dtype, dtype), DEVICE, seed=2)
    expected = inputs.grads.cpu().clone()
    lane_outer(inputs.a.cpu(), inputs.b.cpu(), to_cpu(inputs.rows), expected, scale=case.scale)
    odd = [LaneOuterConfig(32, 32, 32, 3)] if dtype == torch.float32 else []
    for config in (None, *odd):
        grads = outer_cases.make_inputs(case, (dtype, dtype), DEVICE, seed=2).grads
        launch_lane_outer(*inputs[:3], grads, scale=case.scale, config=config)
        # The sums stay float32; only where the matrix units round a mixture is it coarser.
        assert_close(grads.cpu(), expected, torch.float32, 3 * case.slack)


def test_a_folded_float32_meets_16_bit_gradients() -> None:
    case = next(case for case in OUTERS if case.name == "fold")
    inputs = outer_cases.make_inputs(case, (torch.float32, torch.bfloat16), DEVICE, seed=3)
    expected = inputs.grads.cpu().clone()
    lane_outer(inputs.a.cpu(), inputs.b.cpu(), to_cpu(inputs.rows), expected, scale=case.scale)
    launch_lane_outer(*inputs, scale=case.scale)
    assert_close(inputs.grads.cpu(), expected, torch.float16)


@pytest.mark.parametrize("splits", [1, 3])
def test_the_same_call_gives_the_same_bits_wherever_a_lane_lies(splits: int) -> None:
    case = next(case for case in OUTERS if case.name == "ragged")
    inputs = outer_cases.make_inputs(case, (torch.float32, torch.float32), DEVICE, seed=4)
    config = LaneOuterConfig(16, 16, 16, splits)
    launch_lane_outer(*inputs, config=config)
    alone = torch.zeros_like(inputs.grads)
    rows = upload_rows([-1, -1, -1, -1, -1, 3, 3], DEVICE)  # lane 2 as lane 3, alone
    launch_lane_outer(inputs.a, inputs.b, rows, alone, config=config)
    assert torch.equal(alone[3], inputs.grads[2])
    assert not alone[:3].any()


def test_a_launch_reads_the_table_as_it_is_then() -> None:
    """One launch shape serves every table that fits: what a captured graph does."""
    case = next(case for case in OUTERS if case.name == "ragged")
    inputs = outer_cases.make_inputs(case, (torch.float32, torch.float32), DEVICE, seed=5)
    before = inputs.grads.clone()
    inputs.rows.counts[1:] = 0
    launch_lane_outer(*inputs)
    named = int(inputs.rows.lanes[0])
    others = [lane for lane in range(case.lanes) if lane != named]
    assert torch.equal(inputs.grads[others], before[others])
    assert not torch.equal(inputs.grads[named], before[named])


def test_few_lanes_with_many_rows_are_split_and_many_lanes_are_not() -> None:
    assert outer_config(512, 512, 128, 16, 16).splits == 1
    assert outer_config(512, 8, 128, 16, 16).splits == 16
    assert outer_config(512, 8, 128, 16, 14336).splits == 1


def test_rows_are_planned_by_neighbours() -> None:
    assert plan_rows([4, 4, -1, 0, 2, 2], 4) == ([0, 3, 4, 0], [2, 1, 2, 0], [4, 0, 2, 0])
    with pytest.raises(ValueError, match="lane 4 are not neighbours"):
        plan_rows([4, 0, 4], 3)
    with pytest.raises(ValueError, match="2 lanes in 1 segments"):
        plan_rows([4, 0], 1)


def test_a_wrong_argument_is_named() -> None:
    x, bank, out = torch.zeros(2, 3, 1, 4), torch.zeros(5, 1, 4, 6), torch.zeros(2, 3, 1, 6)
    owners = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ShapeError, match=r"bank: expected shape \(lanes, 1, 4, n\)"):
        lane_matmul(x, bank.mT, owners, out)
    with pytest.raises(ShapeError, match=r"out: expected shape \(2, 3, 1, 6\)"):
        lane_matmul(x, bank, owners, out[:1])
    with pytest.raises(ShapeError, match="owners: expected"):
        lane_matmul(x, bank, owners.long(), out)
    rows = upload_rows([0, 1], CPU)
    with pytest.raises(ShapeError, match=r"grads: expected shape \(lanes, 1, 4, 6\)"):
        lane_outer(x, out, rows, bank.mT.contiguous())
    with pytest.raises(ShapeError, match="b: expected shape"):
        lane_outer(x, out[:, :2], rows, bank)
    with pytest.raises(ShapeError, match=r"rows.owners: expected shape \(2,\)"):
        lane_outer(x, out, upload_rows([0], CPU), bank)
