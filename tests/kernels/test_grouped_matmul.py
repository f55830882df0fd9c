"""shrink and expand: the kernels equal the references, and those equal arithmetic by hand.

On a CPU the kernels run in Triton's interpreter; with SHOAL_TEST_GPU=1 on a GPU, compiled.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.kernels.errors import ShapeError
from shoal.kernels.grouped_matmul.cases import EXPANDS, SHRINKS, Case, Inputs, make_inputs
from shoal.kernels.grouped_matmul.kernel import (
    ExpandConfig,
    ShrinkConfig,
    default_expand_config,
    default_shrink_config,
    expand,
    launch_expand,
    launch_shrink,
    shrink,
    upload_tiles,
)
from shoal.kernels.grouped_matmul.tiles import TilePlan, make_tiles, most_tiles
from shoal.kernels.testing import assert_close

ON_GPU = "SHOAL_TEST_GPU" in os.environ
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BOTH = [(case, False) for case in SHRINKS] + [(case, True) for case in EXPANDS]
RUNNABLE = [(case, expands) for case, expands in BOTH if ON_GPU or not case.gpu_only]
Op = Callable[..., None]


def name(value: object) -> str | None:
    if isinstance(value, bool):
        return "expand" if value else "shrink"
    return value.name if isinstance(value, Case) else None


def apply(op: Op, inputs: Inputs, **extra: Any) -> Tensor:
    """Run an op on a copy of ``out`` and return it."""
    out = inputs.out.clone()
    if op in (expand, launch_expand):
        extra["widths"] = inputs.widths
    else:
        extra["modules"] = inputs.modules
    op(
        inputs.x,
        inputs.arena,
        inputs.tiles,
        out,
        scale=inputs.scale,
        alignment=inputs.alignment,
        **extra,
    )
    return out


def on(device: torch.device, inputs: Inputs) -> Inputs:
    tiles = type(inputs.tiles)(*(table.to(device) for table in inputs.tiles))
    return inputs._replace(
        x=inputs.x.to(device),
        arena=inputs.arena.to(device),
        tiles=tiles,
        out=inputs.out.to(device),
    )


def loop_in_float64(inputs: Inputs, *, expands: bool) -> Tensor:
    """The definition, token by token and stored row by stored row."""
    x, arena, out = inputs.x.double(), inputs.arena.double(), inputs.out.double().clone()
    for start, length, address, rank in zip(*(t.tolist() for t in inputs.tiles), strict=True):
        for t in range(start, start + length):
            assert inputs.ranks[t] == rank
            matrix = arena[address + rank * inputs.scale :]
            if not expands:
                for i in range(inputs.modules * rank):
                    out[t, i] = matrix[i * x.shape[1] :][: x.shape[1]] @ x[t]
                continue
            for i in range(rank):
                row, first = matrix[i * out.shape[1] :], 0
                for m, width in enumerate(inputs.widths):
                    out[t, first : first + width] += x[t, m * rank + i] * row[first:][:width]
                    first += width
    return out


def test_a_case_worked_by_hand() -> None:
    # A record of rank 2 at element 1: two elements a rank of something else, then 2 x 2 numbers.
    arena = torch.tensor([9.0, 9.0, 9.0, 9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 9.0])
    x = torch.tensor([[5.0, 5.0], [1.0, 10.0]])
    tiles = upload_tiles(make_tiles([(1, 1, 1, 2)]), CPU, 3)
    shrunk, expanded = torch.ones(2, 2), torch.ones(2, 2)
    shrink(x, arena, tiles, shrunk, modules=1, scale=2)
    expand(x, arena, tiles, expanded, widths=(2,), scale=2)
    assert shrunk.tolist() == [[1.0, 1.0], [21.0, 43.0]]  # (1+20, 3+40), written
    assert expanded.tolist() == [[1.0, 1.0], [32.0, 43.0]]  # 1 + (1+30, 2+40), added


@pytest.mark.parametrize(("case", "expands"), [(c, e) for c, e in BOTH if not c.gpu_only], ids=name)
def test_reference_equals_the_definition_in_float64(case: Case, expands: bool) -> None:
    inputs = make_inputs(case, torch.float32, CPU, seed=1, expands=expands)
    actual = apply(expand if expands else shrink, inputs)
    assert_close(actual, loop_in_float64(inputs, expands=expands), torch.float32)


@pytest.mark.parametrize("single", [True, False], ids=["matvec", "dot"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "expands"), RUNNABLE, ids=name)
def test_kernel_equals_reference(
    case: Case, expands: bool, dtype: torch.dtype, single: bool
) -> None:
    inputs = make_inputs(case, dtype, DEVICE, seed=2, expands=expands)
    if expands:
        actual = apply(launch_expand, inputs, config=ExpandConfig(block_n=128, single=single))
    else:
        shapes = (4, 256) if single else (None, None)
        actual = apply(launch_shrink, inputs, config=ShrinkConfig(16, 128, *shapes))
    expected = apply(expand if expands else shrink, on(CPU, inputs))
    assert_close(actual.cpu(), expected, dtype, case.slack)


@pytest.mark.parametrize(("case", "expands"), RUNNABLE[3:7] + RUNNABLE[-5:], ids=name)
def test_default_launch_parameters_are_right(case: Case, expands: bool) -> None:
    inputs = make_inputs(case, torch.float16, DEVICE, seed=3, expands=expands)
    actual = apply(launch_expand if expands else launch_shrink, inputs)
    expected = apply(expand if expands else shrink, on(CPU, inputs))
    assert_close(actual.cpu(), expected, torch.float16, case.slack)


def test_launch_parameters_divide() -> None:
    """A shared tile's program takes the outputs of a whole number of single-token programs."""
    for tokens, tiles, n in ((1, 1, 16), (256, 256, 16), (256, 256, 192), (8192, 768, 192)):
        config = default_shrink_config(tokens, tiles, n)
        assert config.single_n is None or config.tile_n % config.single_n == 0
    assert default_expand_config(float32=True).tile_k >= 16


def test_a_float32_input_meets_a_half_arena() -> None:
    inputs = make_inputs(EXPANDS[4], torch.float16, DEVICE, seed=4, expands=True)
    inputs = inputs._replace(x=inputs.x.float())
    actual = apply(launch_expand, inputs)
    assert_close(actual.cpu(), apply(expand, on(CPU, inputs)), torch.float16)


def test_a_launch_reads_the_table_as_it_is_then() -> None:
    """One launch shape serves every plan that fits: what a captured graph does."""
    inputs = make_inputs(EXPANDS[4], torch.float32, DEVICE, seed=5, expands=True)
    before = apply(launch_expand, inputs)
    inputs.tiles.lengths[1:] = 0
    after = apply(launch_expand, inputs)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1:], inputs.out[1:])


@pytest.mark.parametrize("expands", [False, True], ids=["shrink", "expand"])
def test_rows_without_adapter_keep_every_bit(expands: bool) -> None:
    case = (EXPANDS if expands else SHRINKS)[4]
    inputs = make_inputs(case, torch.float16, DEVICE, seed=6, expands=expands)
    out = apply(launch_expand if expands else launch_shrink, inputs)
    bare = torch.tensor(inputs.ranks) == 0
    assert bare.any()
    assert torch.equal(out[bare], inputs.out[bare])
    assert not torch.equal(out[~bare], inputs.out[~bare])


def test_tiles_cover_each_adapter_token_once_and_share_one_record() -> None:
    runs = [
        (0, 1, 7, 2),
        (1, 20, 7, 2),
        (25, 16, 9, 3),
        (41, 0, 7, 2),
        (41, 1, 9, 3),
        (42, 2, 3, 1),
    ]
    plan = make_tiles(runs)
    assert plan.starts == [0, 16, 25, 41, 42]
    assert plan.lengths == [16, 5, 16, 1, 2]
    assert plan.addresses == [7, 7, 9, 9, 3]
    assert plan.ranks == [2, 2, 3, 3, 1]


def test_a_run_that_goes_on_after_a_gap_is_another_tile() -> None:
    assert make_tiles([(0, 3, 7, 2), (4, 3, 7, 2)]) == TilePlan([0, 4], [3, 3], [7, 7], [2, 2])


@pytest.mark.parametrize("lengths", [(1,) * 40, (17,) * 9, (640,), (1, 33, 16, 15), (2,) * 7])
def test_no_step_needs_more_tiles_than_its_grid_has(lengths: tuple[int, ...]) -> None:
    runs, start = [], 0
    for i, length in enumerate(lengths):
        runs.append((start, length, i % 2, 4))
        start += length
    plan = make_tiles(runs)
    assert len(plan.starts) <= most_tiles(start, len(lengths)) <= start
    assert sum(plan.lengths) == start
    assert max(plan.lengths) <= 16


def test_a_wrong_argument_is_named() -> None:
    x, arena, out = torch.zeros(3, 4), torch.zeros(64), torch.zeros(3, 8)
    tiles = upload_tiles(make_tiles([(0, 3, 0, 2)]), CPU)
    with pytest.raises(ShapeError, match="out: expected 3 rows"):
        shrink(x, arena, tiles, out[:2], modules=1, scale=0)
    with pytest.raises(ShapeError, match="modules: expected at least 1, got 0"):
        shrink(x, arena, tiles, out, modules=0, scale=0)
    with pytest.raises(ShapeError, match="out: expected 9 columns"):
        expand(x, arena, tiles, out, widths=(4, 5), scale=0)
    with pytest.raises(ShapeError, match="widths: expected 1 to 3 positive numbers"):
        expand(x, arena, tiles, out, widths=(8, 0), scale=0)
    spoiled = tiles._replace(ranks=torch.zeros(7, dtype=torch.int32))
    with pytest.raises(ShapeError, match=r"tiles.ranks: expected shape"):
        expand(x, arena, spoiled, out, widths=(8,), scale=0)
    with pytest.raises(ShapeError, match="alignment: expected one of"):
        expand(x, arena, tiles, out, widths=(8,), scale=0, alignment=3)
