"""core_project and core_mix: kernels equal references, references the definition in float64.

On a CPU the kernels run in Triton's interpreter; with SHOAL_TEST_GPU=1 on a GPU, compiled.
"""

import os

import pytest
import torch

from shoal.kernels.core_apply.epilogue import CoreEpilogue, MixedEpilogue, unchunk
from shoal.kernels.core_apply.epilogue_cases import defined_mix
from shoal.kernels.core_project.cases import (
    CASES,
    Case,
    make_mix_inputs,
    make_project_inputs,
)
from shoal.kernels.core_project.kernel import (
    MixConfig,
    ProjectConfig,
    core_mix,
    core_project,
    launch_core_mix,
    launch_core_project,
)
from shoal.kernels.core_project.reference import core_mix_reference, core_project_reference
from shoal.kernels.errors import ShapeError
from shoal.kernels.silu_mul.cases import CASES as SILU_CASES
from shoal.kernels.silu_mul.cases import make_inputs as make_silu_inputs
from shoal.kernels.silu_mul.kernel import launch_silu_mul
from shoal.kernels.testing import assert_close

ON_GPU = "SHOAL_TEST_GPU" in os.environ
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
RUNNABLE = [case for case in CASES if ON_GPU or not case.gpu_only]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("case", [c for c in CASES if not c.gpu_only], ids=lambda c: c.name)
def test_references_equal_the_definition_in_float64(case: Case) -> None:
    x, a, rows, modules, matrix = make_project_inputs(case, torch.float32, DEVICE, seed=1)
    h = unchunk(x.double() @ a.double().t(), modules, rows.columns)
    mixed = core_project(x, a, rows, modules=modules, matrix=matrix).sum(0)
    assert_close(mixed, defined_mix(h, rows, matrix), torch.float32)
    y, h_column, rows, modules, matrix = make_mix_inputs(case, torch.float32, DEVICE, seed=1)
    h = unchunk(y[:, h_column:], modules, rows.columns)
    mixed = core_mix(y, h_column, rows, modules=modules, matrix=matrix)[0]
    assert_close(mixed, defined_mix(h, rows, matrix), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", RUNNABLE, ids=lambda c: c.name)
def test_core_project_equals_its_reference(case: Case, dtype: torch.dtype) -> None:
    inputs = make_project_inputs(case, dtype, DEVICE, seed=2)
    x, a, rows, modules, matrix = inputs
    mixed = launch_core_project(x, a, rows, modules=modules, matrix=matrix)
    assert mixed.shape[1:] == (case.tokens, modules, case.core.columns)
    assert_close(mixed.sum(0), core_project_reference(*inputs)[0], dtype, case.slack)
    assert not mixed[:, rows.addresses < 0].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", RUNNABLE, ids=lambda c: c.name)
def test_core_mix_equals_its_reference(case: Case, dtype: torch.dtype) -> None:
    inputs = make_mix_inputs(case, dtype, DEVICE, seed=3)
    y, h_column, rows, modules, matrix = inputs
    mixed = launch_core_mix(y, h_column, rows, modules=modules, matrix=matrix)
    assert_close(mixed, core_mix_reference(*inputs), torch.float32, case.slack)
    other = launch_core_mix(
        y, h_column, rows, modules=modules, matrix=matrix, config=MixConfig(16, 4)
    )
    assert_close(other, mixed, torch.float32)


def test_every_split_is_part_of_the_sum() -> None:
    inputs = make_project_inputs(BY_NAME["shared columns"], torch.float32, DEVICE, seed=4)
    x, a, rows, modules, matrix = inputs
    expected = core_project_reference(*inputs)[0]
    shapes = set()
    for config in (
        ProjectConfig(1, 64),
        ProjectConfig(3, 128, num_stages=2),
        ProjectConfig(99, 256, num_stages=2, tile=16),
    ):
        mixed = launch_core_project(x, a, rows, modules=modules, matrix=matrix, config=config)
        shapes.add(len(mixed))
        assert mixed.flatten(1).any(dim=1).all()
        assert_close(mixed.sum(0), expected, torch.float32)
    assert shapes == {1, 3, 5}  # 1100 = 4.3 · 256: never an empty split


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_u_made_before_gives_what_the_inline_epilogue_gives(dtype: torch.dtype) -> None:
    case = next(case for case in SILU_CASES if case.name == "mixed ranks, core")
    gate_up, width, _, bias, core, scale = make_silu_inputs(case, dtype, DEVICE, seed=5)
    assert isinstance(core, CoreEpilogue)
    inline = launch_silu_mul(gate_up, width, bias=bias, core=core, scale=scale)
    mixed = launch_core_mix(gate_up, core.h_column, core.rows, modules=2, matrix=core.matrix)
    made = MixedEpilogue(mixed, core.basis)
    assert_close(
        launch_silu_mul(gate_up, width, bias=bias, core=made, scale=scale), inline, torch.float32
    )


def test_a_wrong_argument_is_named() -> None:
    x, a, rows, modules, matrix = make_project_inputs(
        BY_NAME["mixed ranks"], torch.float32, DEVICE, seed=6
    )
    with pytest.raises(ShapeError, match=r"projection: expected shape \(64 or more, 331\)"):
        core_project(x, a[:63], rows, modules=modules, matrix=matrix)
    with pytest.raises(ShapeError, match="addresses"):
        core_project(x[1:], a, rows, modules=modules, matrix=matrix)
    with pytest.raises(ShapeError, match="y: expected at least 70 columns"):
        core_mix(x[:, :69], 6, rows, modules=modules, matrix=matrix)
    with pytest.raises(ShapeError, match="matrix"):
        core_mix(x, 6, rows, modules=modules, matrix=-1)
