"""The GEMM plan: what it chooses for shapes it knows and for those it does not."""

import pytest
import torch

from shoal.adapters.spec import GROUPS, Group
from shoal.server.model.decoder import Linear
from shoal.server.model.gemms import (
    LARGE,
    NO_PLAN,
    SPARE_ROWS,
    Choice,
    GemmPlan,
    Shape,
    candidates,
    multiply,
)

PLAN = GemmPlan(
    {
        Shape("o", 8, 0): Choice(0, "cublas"),
        Shape("o", 8, 16): Choice(64, "cublaslt"),
        Shape("o", 32, 16): Choice(128, "cublas"),
    },
    rows=(8, 32),
)


def test_a_row_count_takes_the_choice_of_the_next_larger_one() -> None:
    assert [PLAN.choose("o", rows, 16) for rows in (1, 8, 9, 32)] == [
        Choice(64, "cublaslt"),
        Choice(64, "cublaslt"),
        Choice(128, "cublas"),
        Choice(128, "cublas"),
    ]


def test_beyond_what_was_measured_a_gemm_is_as_wide_as_it_must_be() -> None:
    assert PLAN.choose("qkv", 4096, 16) == Choice(48, LARGE)
    assert PLAN.choose("o", 4096, 0) == Choice(0, LARGE)
    assert NO_PLAN.choose("gate_up", 1, 32) == Choice(64)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("columns", [16, 32, 64])
def test_candidates_hold_what_is_needed_and_fit_behind_the_weights(
    group: Group, columns: int
) -> None:
    widths = candidates(group, columns)
    need = len(GROUPS[group]) * columns
    assert need in widths
    assert all(need <= width <= SPARE_ROWS for width in widths)


def test_spare_rows_do_not_change_the_outputs() -> None:
    linear = Linear("o", 4, 6, False, layer=0, device="cpu", dtype=torch.float32, spare_rows=8)
    linear.widened.copy_(torch.randn(14, 4))
    x = torch.randn(3, 4)
    assert torch.equal(multiply(x, linear, Choice(0)), x @ linear.weight.T)
    wide = multiply(x, linear, Choice(5))
    assert wide.shape == (3, 11)
    torch.testing.assert_close(wide[:, 6:], x @ linear.widened[6:11].T)
