"""Paged attention: the kernels equal the reference, and the reference equals the definition.

On a CPU the kernels run in Triton's interpreter; with SHOAL_TEST_GPU=1 on a GPU, compiled.
"""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.kernels.errors import ShapeError
from shoal.kernels.paged_attention.cases import (
    DECODE_CASES,
    PREFILL_CASES,
    Case,
    Inputs,
    make_inputs,
)
from shoal.kernels.paged_attention.kernel import (
    launch_paged_decode,
    launch_paged_prefill,
    paged_decode,
    paged_prefill,
)
from shoal.kernels.paged_attention.launches import (
    MAX_SPLITS,
    DecodeConfig,
    PrefillConfig,
    default_decode_config,
    default_prefill_config,
)
from shoal.kernels.testing import assert_close

ON_GPU = "SHOAL_TEST_GPU" in os.environ
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
HALVES = [torch.float16, torch.bfloat16]


def runnable(cases: tuple[Case, ...], interpreted: tuple[str, ...]) -> list[Any]:
    """Cases by dtypes: on a GPU all of them; interpreted, float32 and a few in 16 bits."""
    return [
        pytest.param(case, dtype, id=f"{case.name}-{dtype}")
        for case in cases
        for dtype in [torch.float32, *HALVES]
        if ON_GPU or (not case.gpu_only and (dtype not in HALVES or case.name in interpreted))
    ]


def reference(case: Case, inputs: Inputs) -> Tensor:
    """The public entry, which on CPU tensors runs the reference."""
    host = Inputs(*(tensor.cpu() for tensor in inputs))
    out = torch.empty(host.q.shape, dtype=host.q.dtype)
    return paged_prefill(
        *host, scale=case.scale, window=case.window, softcap=case.softcap, out=out
    ).to(DEVICE)


def decode(case: Case, inputs: Inputs, config: DecodeConfig | None = None) -> Tensor:
    return launch_paged_decode(
        *inputs[:5], scale=case.scale, window=case.window, softcap=case.softcap, config=config
    )


def prefill(case: Case, inputs: Inputs, config: PrefillConfig | None = None) -> Tensor:
    return launch_paged_prefill(
        *inputs, scale=case.scale, window=case.window, softcap=case.softcap, config=config
    )


def definition_in_float64(case: Case, inputs: Inputs) -> Tensor:
    """Query by query, head by head, position by position of the table."""
    q, keys, values, tables, contexts, starts = (
        t.cpu().double() if t.is_floating_point() else t.cpu() for t in inputs
    )
    out = torch.zeros(q.shape, dtype=torch.float64)
    group = case.heads // case.kv_heads
    for row, context in enumerate(contexts.tolist()):
        first, end = starts[row : row + 2].tolist()
        for token in range(first, end):
            at = context - (end - token)
            seen = range(max(0, at - case.window + 1) if case.window else 0, at + 1)
            if not seen:
                continue
            places = [divmod(p, case.block_tokens) for p in seen]
            for head in range(case.heads):
                slots = [(int(tables[row, b]), o, head // group) for b, o in places]
                k = torch.stack([keys[slot] for slot in slots])
                v = torch.stack([values[slot] for slot in slots])
                scores = k @ q[token, head] * case.scale
                if case.softcap:
                    scores = case.softcap * torch.tanh(scores / case.softcap)
                out[token, head] = scores.softmax(0) @ v
    return out


def test_reference_equals_a_case_worked_by_hand() -> None:
    # Scores log 3 and 0 weigh the values 4 and 8 by 3/4 and 1/4.
    keys = torch.tensor([[0.0], [3.0]]).log().nan_to_num(neginf=0).view(1, 2, 1, 1).flip(1)
    values = torch.tensor([4.0, 8.0]).view(1, 2, 1, 1)
    out = paged_decode(
        torch.ones(1, 1, 1), keys, values, torch.tensor([[0]]),
        torch.tensor([2], dtype=torch.int32), scale=1.0,
    )  # fmt: skip
    assert out.item() == pytest.approx(5.0)


@pytest.mark.parametrize(
    "case", [c for c in DECODE_CASES + PREFILL_CASES if not c.gpu_only], ids=lambda c: c.name
)
def test_reference_equals_the_definition_in_float64(case: Case) -> None:
    inputs = make_inputs(case, torch.float32, DEVICE, seed=1)
    expected = definition_in_float64(case, inputs)
    assert_close(reference(case, inputs).cpu(), expected, torch.float32)
    if case.decode:
        got = paged_decode(*inputs[:5], scale=case.scale, window=case.window, softcap=case.softcap)
        assert_close(got.cpu(), expected, torch.float32)


@pytest.mark.parametrize(
    ("case", "dtype"), runnable(DECODE_CASES, ("around tiles", "split", "blocks of 4"))
)
def test_decode_kernel_equals_reference(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype, DEVICE, seed=2)
    config = DecodeConfig(tile=16, splits=case.splits, min_split=case.min_split)
    got = decode(case, inputs, config)
    assert_close(got, reference(case, inputs), dtype, case.slack)


@pytest.mark.parametrize(
    ("case", "dtype"), runnable(PREFILL_CASES, ("one token", "head 96", "blocks of 4"))
)
def test_prefill_kernel_equals_reference(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype, DEVICE, seed=3)
    got = prefill(case, inputs, PrefillConfig(rows_m=32, tile=16))
    assert_close(got, reference(case, inputs), dtype, case.slack)


@pytest.mark.parametrize("case", [DECODE_CASES[9], DECODE_CASES[16]], ids=lambda c: c.name)
def test_default_decode_parameters_are_right(case: Case) -> None:
    inputs = make_inputs(case, torch.float16, DEVICE, seed=4)
    assert_close(decode(case, inputs), reference(case, inputs), torch.float16)


@pytest.mark.parametrize("case", [PREFILL_CASES[2], PREFILL_CASES[11]], ids=lambda c: c.name)
def test_default_prefill_parameters_are_right(case: Case) -> None:
    inputs = make_inputs(case, torch.float16, DEVICE, seed=5)
    assert_close(prefill(case, inputs), reference(case, inputs), torch.float16)


def test_a_prefill_of_single_tokens_is_a_decode() -> None:
    case = DECODE_CASES[2]
    inputs = make_inputs(case, torch.float32, DEVICE, seed=6)
    assert_close(prefill(case, inputs), decode(case, inputs), torch.float32)


def test_out_may_be_part_of_a_larger_tensor_and_the_rest_is_left_alone() -> None:
    case = DECODE_CASES[2]
    inputs = make_inputs(case, torch.float32, DEVICE, seed=7)
    whole = torch.full((20, case.heads, case.head_dim), 7.0, device=DEVICE)
    rows = inputs.q.shape[0]
    launch_paged_decode(*inputs[:5], scale=case.scale, out=whole[2 : 2 + rows])
    assert_close(whole[2 : 2 + rows], reference(case, inputs), torch.float32)
    assert (whole[:2] == 7.0).all()
    assert (whole[2 + rows :] == 7.0).all()


def test_a_broken_row_does_not_reach_the_others() -> None:
    case = DECODE_CASES[2]
    inputs = make_inputs(case, torch.float32, DEVICE, seed=8)
    want = decode(case, inputs)
    inputs.q[3] = float("nan")
    got = decode(case, inputs)
    assert not got[3].isfinite().any()
    others = [0, 1, 2, 4]
    assert torch.equal(got[others], want[others])


def test_every_launch_shares_long_rows_and_keeps_short_ones_whole() -> None:
    few = default_decode_config(8, 4096, dim=128, itemsize=2, processors=132)
    many = default_decode_config(2048, 512, dim=128, itemsize=2, processors=132)
    skewed = default_decode_config(2048, 1 << 17, dim=128, itemsize=2, processors=132)
    assert few.splits == 16
    assert many.splits == 1
    assert 1 < skewed.splits <= MAX_SPLITS


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("group", [1, 3, 7, 71, 200])
def test_a_query_tile_has_room_for_a_group(group: int, itemsize: int) -> None:
    for tokens in (1, 100, 5000):
        config = default_prefill_config(tokens, 1, group, 128, itemsize)
        assert config.rows_m >= group
        assert config.rows_m.bit_count() == 1


def test_a_wrong_argument_is_named() -> None:
    inputs = make_inputs(DECODE_CASES[2], torch.float32, DEVICE, seed=9)
    tables, contexts = inputs.block_tables, inputs.context_lens
    for name, spoiled in {
        "q": inputs._replace(q=inputs.q[:, :3]),
        "keys": inputs._replace(keys=inputs.keys.transpose(0, 1)),
        "values": inputs._replace(values=inputs.values[:, :-1]),
        "block_tables": inputs._replace(block_tables=tables[:-1], context_lens=contexts[:-1]),
        "context_lens": inputs._replace(context_lens=contexts.long()),
    }.items():
        with pytest.raises(ShapeError) as caught:
            paged_decode(*spoiled[:5], scale=1.0)
        assert caught.value.argument == name
    with pytest.raises(ShapeError, match="query_starts: expected shape"):
        paged_prefill(*inputs[:5], inputs.query_starts[1:], scale=1.0)
    with pytest.raises(ShapeError, match="window: expected None or at least 1, got 0"):
        paged_decode(*inputs[:5], scale=1.0, window=0)
    with pytest.raises(ShapeError, match="softcap: expected None or above 0"):
        paged_decode(*inputs[:5], scale=1.0, softcap=0.0)
