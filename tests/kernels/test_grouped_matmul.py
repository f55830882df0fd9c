"""grouped_matmul: the kernel equals the reference, and the reference equals arithmetic by hand.

On a CPU the kernel runs in Triton's interpreter; with SHOAL_TEST_GPU=1 on a GPU, compiled.
"""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shoal.kernels.errors import ShapeError
from shoal.kernels.grouped_matmul.cases import CASES, Case, Inputs, make_inputs
from shoal.kernels.grouped_matmul.kernel import (
    MatmulConfig,
    Tiles,
    grouped_matmul,
    launch_grouped_matmul,
)
from shoal.kernels.grouped_matmul.reference import grouped_matmul_reference
from shoal.kernels.grouped_matmul.tiles import make_tiles
from shoal.kernels.testing import assert_close

ON_GPU = "SHOAL_TEST_GPU" in os.environ
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
RUNNABLE = [case for case in CASES if ON_GPU or not case.gpu_only]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Op = Callable[..., None]


def apply(op: Op, inputs: Inputs, **extra: object) -> Tensor:
    """Run an op on a copy of ``out`` and return it."""
    out = inputs.out.clone()
    op(
        inputs.x,
        inputs.arena,
        inputs.addresses,
        out,
        row_stride=inputs.row_stride,
        transposed=inputs.transposed,
        ranks=inputs.ranks,
        tiles=inputs.tiles,
        **extra,
    )
    return out


def loop_in_float64(inputs: Inputs) -> Tensor:
    """The definition, token by token and stored row by stored row."""
    x, arena = inputs.x.double().cpu(), inputs.arena.double().cpu()
    out = inputs.out.double().cpu().clone()
    k, n = x.shape[1], out.shape[1]
    for t, address in enumerate(inputs.addresses.tolist()):
        if address < 0:
            continue
        rows = n if inputs.transposed else k
        rank = rows if inputs.ranks is None else int(inputs.ranks[t])
        for i in range(rank):
            row = arena[address + i * inputs.row_stride :]
            if inputs.transposed:
                out[t, i] += row[:k] @ x[t]
            else:
                out[t] += x[t, i] * row[:n]
    return out


def test_reference_equals_a_case_worked_by_hand() -> None:
    # Token 0 uses the window [[1, 2], [3, 4]] at element 1 of rows of 3; token 1 uses nothing.
    arena = torch.tensor([9.0, 1.0, 2.0, 9.0, 3.0, 4.0, 9.0])
    x = torch.tensor([[1.0, 10.0], [5.0, 5.0]])
    addresses = torch.tensor([1, -1])
    plain, transposed = torch.ones(2, 2), torch.ones(2, 2)
    grouped_matmul(x, arena, addresses, plain, row_stride=3)
    grouped_matmul(x, arena, addresses, transposed, row_stride=3, transposed=True)
    assert plain.tolist() == [[32.0, 43.0], [1.0, 1.0]]  # 1 + (1+30, 2+40)
    assert transposed.tolist() == [[22.0, 44.0], [1.0, 1.0]]  # 1 + (1+20, 3+40)


@pytest.mark.parametrize("case", [c for c in CASES if not c.gpu_only], ids=lambda c: c.name)
def test_reference_equals_the_definition_in_float64(case: Case) -> None:
    inputs = make_inputs(case, torch.float32, DEVICE, seed=1)
    actual = apply(grouped_matmul_reference, inputs)
    assert_close(actual.cpu(), loop_in_float64(inputs), torch.float32)


@pytest.mark.parametrize("single", [True, False], ids=["matvec", "dot"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", RUNNABLE, ids=lambda c: c.name)
def test_kernel_equals_reference(case: Case, dtype: torch.dtype, single: bool) -> None:
    inputs = make_inputs(case, dtype, DEVICE, seed=2)
    block_n = 16 if case.transposed else 128
    config = MatmulConfig(block_n=block_n, tile_k=128, single_k=256 if single else None)
    actual = apply(launch_grouped_matmul, inputs, alignment=case.alignment, config=config)
    assert_close(actual, apply(grouped_matmul_reference, inputs), dtype, case.slack)


@pytest.mark.parametrize("case", [CASES[6], CASES[10], CASES[12], CASES[14]], ids=lambda c: c.name)
def test_default_launch_parameters_are_right(case: Case) -> None:
    inputs = make_inputs(case, torch.float16, DEVICE, seed=3)
    actual = apply(launch_grouped_matmul, inputs, alignment=case.alignment)
    assert_close(actual, apply(grouped_matmul_reference, inputs), torch.float16)


def test_a_float32_input_meets_a_half_arena() -> None:
    inputs = make_inputs(CASES[6], torch.float16, DEVICE, seed=4)
    inputs = inputs._replace(x=inputs.x.float())
    actual = apply(launch_grouped_matmul, inputs)
    assert_close(actual, apply(grouped_matmul_reference, inputs), torch.float16)


def test_tiles_do_not_change_the_result() -> None:
    inputs = make_inputs(CASES[8], torch.float32, DEVICE, seed=5)
    alone = apply(grouped_matmul, inputs._replace(tiles=None))
    assert_close(apply(grouped_matmul, inputs), alone, torch.float32)


def test_rows_without_adapter_keep_every_bit() -> None:
    inputs = make_inputs(CASES[6], torch.float16, DEVICE, seed=6)
    out = apply(launch_grouped_matmul, inputs)
    bare = inputs.addresses < 0
    assert torch.equal(out[bare], inputs.out[bare])


def test_tiles_cover_each_adapter_row_once_and_share_one_address() -> None:
    runs = [(7, 1), (7, 20), (-1, 4), (9, 16), (7, 0), (9, 1), (3, 2)]
    plan = make_tiles(runs, 16)
    assert plan.starts == [0, 16, 25, 41, 42]
    assert plan.lengths == [16, 5, 16, 1, 2]
    padded = make_tiles(runs, 16, pad_to=8)
    assert padded.lengths == [*plan.lengths, 0, 0, 0]


def test_a_plan_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="pad_to: 2 tiles are needed, got 1"):
        make_tiles([(1, 20)], 16, pad_to=1)
    with pytest.raises(ValueError, match="tile_tokens: expected a power of two"):
        make_tiles([(1, 20)], 24)


def test_a_wrong_argument_is_named() -> None:
    x, arena, out = torch.zeros(3, 4), torch.zeros(64), torch.zeros(3, 8)
    addresses = torch.zeros(3, dtype=torch.int64)
    two = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ShapeError, match="row_stride: expected at least the stored width 8, got 7"):
        grouped_matmul(x, arena, addresses, out, row_stride=7)
    with pytest.raises(ShapeError, match="ranks: expected shape"):
        grouped_matmul(x, arena, addresses, out, row_stride=8, ranks=two)
    with pytest.raises(ShapeError, match="out: expected 3 rows"):
        grouped_matmul(x, arena, addresses, out[:2], row_stride=8)
    with pytest.raises(ShapeError, match=r"tiles.lengths: expected shape"):
        grouped_matmul(x, arena, addresses, out, row_stride=8, tiles=Tiles(two, two[:1], 16))
    with pytest.raises(ShapeError, match="alignment: expected one of"):
        grouped_matmul(x, arena, addresses, out, row_stride=8, alignment=3)
