"""fold_sum: the kernel equals the reference, and the reference equals arithmetic by hand.

On a CPU the kernel runs in Triton's interpreter; with SHOAL_TEST_GPU=1 on a GPU, compiled.
"""

import os

import pytest
import torch

from shoal.kernels.errors import ShapeError
from shoal.kernels.fold_sum.cases import CASES, Case, make_inputs, used_part
from shoal.kernels.fold_sum.kernel import FoldConfig, fold_sum, launch_fold_sum
from shoal.kernels.fold_sum.reference import fold_sum_reference
from shoal.kernels.testing import assert_close

ON_GPU = "SHOAL_TEST_GPU" in os.environ
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
RUNNABLE = [case for case in CASES if ON_GPU or not case.gpu_only]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def ranks_of(*ranks: int) -> torch.Tensor:
    return torch.tensor(ranks, dtype=torch.int32)


def test_reference_equals_a_case_worked_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]]).expand(3, 7)
    # 1+4+7, 2+5, 3+6; left out; 1+3+5+7, 2+4+6
    expected = [[12.0, 7.0, 9.0], [0.0, 0.0, 0.0], [16.0, 12.0, 0.0]]
    assert fold_sum_reference(x, ranks_of(3, 0, 2), 3).tolist() == expected


@pytest.mark.parametrize("case", [c for c in CASES if not c.gpu_only], ids=lambda c: c.name)
def test_reference_equals_the_definition_in_float64(case: Case) -> None:
    x, ranks, columns = make_inputs(case, torch.float32, DEVICE, seed=1)
    expected = torch.zeros((case.tokens, columns), dtype=torch.float64)
    for t, rank in enumerate(ranks.tolist()):
        for j in range(case.width if rank else 0):
            expected[t, j % rank] += x[t, j].double().cpu()
    assert_close(fold_sum_reference(x, ranks, columns).cpu(), expected, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", RUNNABLE, ids=lambda c: c.name)
def test_kernel_equals_reference(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype, DEVICE, seed=2)
    actual = launch_fold_sum(*inputs, config=FoldConfig(elements=512))
    assert actual.dtype == torch.float32
    # Sums are float32 whatever x is, so the float32 tolerance holds for every dtype.
    actual = used_part(actual, inputs.ranks)
    assert_close(actual, fold_sum_reference(*inputs), torch.float32, case.slack)


def test_the_other_tokens_do_not_matter() -> None:
    x, ranks, columns = make_inputs(CASES[7], torch.float32, DEVICE, seed=3)
    alone = launch_fold_sum(x[2:3], ranks[2:3], columns)
    rank = int(ranks[2])
    assert torch.equal(launch_fold_sum(x, ranks, columns)[2, :rank], alone[0, :rank])


@pytest.mark.parametrize("columns", [0, 1025])
def test_a_rank_out_of_range_is_refused(columns: int) -> None:
    with pytest.raises(ShapeError, match=f"columns: expected 1 to 1024, got {columns}"):
        fold_sum(torch.zeros(2, 4), ranks_of(1, 1), columns)


def test_a_wrong_argument_is_named() -> None:
    with pytest.raises(ShapeError, match="x: expected a contiguous last axis"):
        fold_sum(torch.zeros(4, 2).t(), ranks_of(1, 1), 2)
    with pytest.raises(ShapeError, match="ranks: expected shape"):
        fold_sum(torch.zeros(2, 4), ranks_of(1), 2)
