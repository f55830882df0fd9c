"""fold_sum: the kernel equals the reference, and the reference equals arithmetic by hand.

On a CPU the kernel runs in Triton's interpreter; with SHOAL_TEST_GPU=1 on a GPU, compiled.
"""

import os

import pytest
import torch

from shoal.kernels.errors import ShapeError
from shoal.kernels.fold_sum.cases import CASES, Case, make_inputs
from shoal.kernels.fold_sum.kernel import FoldConfig, fold_sum, launch_fold_sum
from shoal.kernels.fold_sum.reference import fold_sum_reference
from shoal.kernels.testing import assert_close

ON_GPU = "SHOAL_TEST_GPU" in os.environ
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
RUNNABLE = [case for case in CASES if ON_GPU or not case.gpu_only]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def test_reference_equals_a_case_worked_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]])
    # 1+4+7, 2+5, 3+6
    assert fold_sum_reference(x, 3).tolist() == [[12.0, 7.0, 9.0]]


@pytest.mark.parametrize("case", [c for c in CASES if not c.gpu_only], ids=lambda c: c.name)
def test_reference_equals_the_definition_in_float64(case: Case) -> None:
    x = make_inputs(case, torch.float32, DEVICE, seed=1)
    expected = torch.zeros((case.tokens, case.rank), dtype=torch.float64)
    for j in range(case.width):
        expected[:, j % case.rank] += x[:, j].double().cpu()
    assert_close(fold_sum_reference(x, case.rank).cpu(), expected, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", RUNNABLE, ids=lambda c: c.name)
def test_kernel_equals_reference(case: Case, dtype: torch.dtype) -> None:
    x = make_inputs(case, dtype, DEVICE, seed=2)
    actual = launch_fold_sum(x, case.rank, config=FoldConfig(elements=512))
    assert actual.dtype == torch.float32
    # Sums are float32 whatever x is, so the float32 tolerance holds for every dtype.
    assert_close(actual, fold_sum_reference(x, case.rank), torch.float32, case.slack)


def test_folding_a_fold_gives_the_smaller_fold() -> None:
    x = make_inputs(CASES[4], torch.float32, DEVICE, seed=3)
    assert_close(fold_sum(fold_sum(x, 12), 4), fold_sum(x, 4), torch.float32)


@pytest.mark.parametrize("rank", [0, 1025])
def test_a_rank_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(ShapeError, match=f"rank: expected 1 to 1024, got {rank}"):
        fold_sum(torch.zeros(2, 4), rank)


def test_a_strided_last_axis_is_refused() -> None:
    with pytest.raises(ShapeError, match="x: expected a contiguous last axis"):
        fold_sum(torch.zeros(4, 2).t(), 2)
