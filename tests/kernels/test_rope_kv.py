"""rope_kv: the kernel equals the reference, and the reference equals arithmetic by hand.

On a CPU the kernel runs in Triton's interpreter; with SHOAL_TEST_GPU=1 on a GPU, compiled.
"""

import math
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shoal.kernels.core_apply.epilogue import CoreEpilogue
from shoal.kernels.core_apply.epilogue_cases import defined_deltas
from shoal.kernels.errors import ShapeError
from shoal.kernels.launching import TileConfig
from shoal.kernels.rope_kv.cases import CASES, Case, Inputs, make_inputs
from shoal.kernels.rope_kv.kernel import launch_rope_kv, rope_kv
from shoal.kernels.rope_kv.reference import rope_kv_reference, rotation_table
from shoal.kernels.testing import assert_close

ON_GPU = "SHOAL_TEST_GPU" in os.environ
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
RUNNABLE = [case for case in CASES if ON_GPU or not case.gpu_only]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BY_NAME = {case.name: case for case in CASES}


def launch(inputs: Inputs, config: TileConfig | None = None) -> Tensor:
    *arguments, q_norm, k_norm, eps, bias, kv_limit, core, scale = inputs
    return launch_rope_kv(
        *arguments,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=eps,
        bias=bias,
        kv_limit=kv_limit,
        core=core,
        scale=scale,
        config=config,
    )


def own_caches(inputs: Inputs) -> Inputs:
    """The same inputs with caches that may be written."""
    return inputs._replace(
        key_cache=inputs.key_cache.clone(), value_cache=inputs.value_cache.clone()
    )


def test_reference_equals_a_case_worked_by_hand() -> None:
    # One head of two: a quarter turn takes (1, 2) to (-2, 1). The seventh column is not looked at.
    qkv = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 99.0]])
    rotations = rotation_table(torch.tensor([math.pi / 2]), torch.arange(2))
    keys, values = torch.zeros(2, 2, 1, 2), torch.zeros(2, 2, 1, 2)
    q = rope_kv(qkv, 1, torch.tensor([1]), rotations, torch.tensor([2]), keys, values)
    assert_close(q, torch.tensor([[[-2.0, 1.0]]]), torch.float32)
    expected = torch.zeros(2, 2, 1, 2)
    expected[1, 0, 0] = torch.tensor([-4.0, 3.0])
    assert_close(keys, expected, torch.float32)
    assert values[1, 0, 0].tolist() == [5.0, 6.0]
    assert int(values.count_nonzero()) == 2


@pytest.mark.parametrize("name", [case.name for case in CASES if case.core and not case.gpu_only])
def test_reference_equals_the_definition_in_float64(name: str) -> None:
    case = BY_NAME[name]
    inputs = make_inputs(case, torch.float32, DEVICE, seed=1)
    core, dim = inputs.core, case.head_dim
    assert core is not None
    out = rope_kv_reference(*inputs)
    widths = (case.heads * dim, case.kv_heads * dim, case.kv_heads * dim)
    ys = inputs.qkv[:, : sum(widths)].double() + defined_deltas(inputs.qkv, core, widths)
    if inputs.scale is not None:
        scale = inputs.scale
        ys = ys / (scale.sums.double().sum(0) / scale.width + scale.eps).sqrt()[:, None]
    for t, y in enumerate(ys):
        y += 0.0 if inputs.bias is None else inputs.bias
        heads = y.view(-1, dim)
        q, k = heads[: case.heads], heads[case.heads : case.heads + case.kv_heads]
        if inputs.q_norm is not None and inputs.k_norm is not None:
            q = q / (q.square().mean(1, keepdim=True) + inputs.eps).sqrt() * inputs.q_norm
            k = k / (k.square().mean(1, keepdim=True) + inputs.eps).sqrt() * inputs.k_norm
        angles = torch.view_as_complex(
            inputs.rotations[inputs.positions[t]].double().view(2, -1).t().contiguous()
        )
        q, k = (torch.complex(*x.chunk(2, dim=1)) * angles for x in (q, k))
        assert_close(out[t], torch.cat((q.real, q.imag), 1), torch.float32)
        slot = int(inputs.slot_mapping[t])
        if slot >= 0:
            cell = divmod(slot, case.block_tokens)
            assert_close(inputs.key_cache[cell], torch.cat((k.real, k.imag), 1), torch.float32)
            values = heads[case.heads + case.kv_heads :]
            assert_close(inputs.value_cache[cell], values, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", RUNNABLE, ids=lambda c: c.name)
def test_kernel_equals_reference(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype, DEVICE, seed=2)
    expected = own_caches(inputs)
    expected_q = rope_kv_reference(*expected)
    q = launch(inputs)
    assert q.dtype == dtype
    assert_close(q, expected_q, dtype, case.slack)
    assert_close(inputs.key_cache, expected.key_cache, dtype, case.slack)
    assert_close(inputs.value_cache, expected.value_cache, dtype, case.slack)
    written = int((inputs.slot_mapping >= 0).sum())
    assert int(inputs.value_cache.flatten(0, 1).flatten(1).any(1).sum()) == written


def test_a_token_without_adapter_is_what_it_is_without_adapters() -> None:
    inputs = make_inputs(BY_NAME["mixed ranks, core"], torch.float16, DEVICE, seed=3)
    assert isinstance(inputs.core, CoreEpilogue)
    bare = inputs.core.rows.addresses < 0
    plain = own_caches(inputs)._replace(core=None)
    without, with_core = launch(plain), launch(inputs)
    assert torch.equal(with_core[bare], without[bare])
    assert not torch.equal(with_core[~bare], without[~bare])
    slots = inputs.slot_mapping[bare & (inputs.slot_mapping >= 0)]
    keys, plain_keys = (x.key_cache.flatten(0, 1)[slots] for x in (inputs, plain))
    assert torch.equal(keys, plain_keys)


def test_heads_that_a_program_does_not_divide_are_all_done() -> None:
    inputs = make_inputs(BY_NAME["divides nothing"], torch.float32, DEVICE, seed=4)
    expected = own_caches(inputs)
    expected_q = rope_kv_reference(*expected)
    # 24 columns are padded to 32: two heads in a program, of nine and three.
    assert_close(launch(inputs, TileConfig(2, 64, 4)), expected_q, torch.float32)
    assert_close(inputs.key_cache, expected.key_cache, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_infinite_or_nan_enters_the_cache(dtype: torch.dtype) -> None:
    inputs = make_inputs(BY_NAME["broken values"], dtype, DEVICE, seed=5)
    launch(inputs)
    assert inputs.key_cache.isfinite().all()
    assert inputs.value_cache.isfinite().all()


def fail_qkv(i: Inputs) -> Inputs:
    return i._replace(qkv=i.qkv[:, :-1])


def fail_positions(i: Inputs) -> Inputs:
    return i._replace(positions=i.positions.int())


def fail_rotations(i: Inputs) -> Inputs:
    return i._replace(rotations=i.rotations[:, :-1])


def fail_value_cache(i: Inputs) -> Inputs:
    return i._replace(value_cache=i.value_cache[:-1])


def fail_k_norm(i: Inputs) -> Inputs:
    return i._replace(k_norm=None)


@pytest.mark.parametrize(
    "spoil", [fail_qkv, fail_positions, fail_rotations, fail_value_cache, fail_k_norm]
)
def test_a_wrong_argument_is_named(spoil: Callable[[Inputs], Inputs]) -> None:
    inputs = make_inputs(BY_NAME["mixed ranks, core"], torch.float32, DEVICE, seed=6)
    with pytest.raises(ShapeError) as caught:
        launch(spoil(inputs))
    assert caught.value.argument == spoil.__name__.removeprefix("fail_")
