"""Records are laid out as documented, with the scale folded in."""

import pytest
import torch

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.families import core, fold, lora
from shoal.adapters.packing import make_spec, pack_adapter
from shoal.adapters.spec import BaseShape, Dims, Target
from shoal.adapters.weights import AdapterWeights

SHAPE = BaseShape(
    name="tiny",
    digest="0" * 64,
    num_layers=2,
    dims={
        "q_proj": Dims(6, 6),
        "k_proj": Dims(3, 6),
        "v_proj": Dims(3, 6),
        "o_proj": Dims(6, 6),
        "gate_proj": Dims(8, 6),
        "up_proj": Dims(8, 6),
        "down_proj": Dims(6, 8),
    },
)
K1 = Target(1, "k_proj")
UP0 = Target(0, "up_proj")


def test_core_record_is_scaled_r_by_layer_and_module() -> None:
    r_k = torch.arange(4.0).view(2, 2)
    weights = AdapterWeights(
        "lora_xs", "core", {K1: (r_k,), UP0: (torch.ones(1, 1),)}, {K1: 0.5, UP0: 3.0}, "b"
    )
    packed = pack_adapter(weights, SHAPE, "d", torch.float32)
    assert packed.spec == make_spec(weights, SHAPE, "d")
    assert (packed.spec.rank, packed.spec.basis_id) == (2, "b")
    table = packed.data.view(2, 7, 2, 2)
    assert torch.equal(table[1, 1], 0.5 * r_k)
    assert table[0, 5].tolist() == [[3.0, 0.0], [0.0, 0.0]]
    assert packed.data.count_nonzero() == 4
    offset = core.record_offset(SHAPE, 2, 1, "k_proj")
    assert torch.equal(packed.data[offset : offset + 4].view(2, 2), 0.5 * r_k)


def test_fold_record_is_scaled_d_with_a_groups_columns_side_by_side() -> None:
    d_k = torch.arange(1.0, 7.0).view(2, 3)
    weights = AdapterWeights("miss", "fold", {K1: (d_k,)}, {K1: 2.0})
    packed = pack_adapter(weights, SHAPE, "d", torch.float32)
    offset = fold.record_offset(SHAPE, 2, 1, "qkv")
    table = packed.data[offset : offset + 2 * 12].view(2, 12)
    assert torch.equal(table[:, 6:9], 2 * d_k)
    assert packed.data.count_nonzero() == 6


def test_fold_ranks_that_differ_repeat_up_to_their_common_multiple() -> None:
    """Zero-padding would be wrong: a longer fold of x is another function."""
    d_k, d_up = torch.randn(2, 3), torch.randn(3, 8)
    weights = AdapterWeights("miss", "fold", {K1: (d_k,), UP0: (d_up,)}, {K1: 1.0, UP0: 1.0})
    packed = pack_adapter(weights, SHAPE, "d", torch.float32)
    assert packed.spec.rank == 6
    offset = fold.record_offset(SHAPE, 6, 1, "qkv")
    table = packed.data[offset : offset + 6 * 12].view(6, 12)
    assert torch.equal(table[:, 6:9], torch.cat([d_k, d_k, d_k]))


def test_fold_ranks_without_a_small_common_multiple_are_refused() -> None:
    weights = AdapterWeights(
        "miss", "fold", {K1: (torch.ones(63, 3),), UP0: (torch.ones(64, 8),)}, {K1: 1.0, UP0: 1.0}
    )
    with pytest.raises(AdapterRejected, match=r"rank: .*\[63, 64\].*4032"):
        make_spec(weights, SHAPE, "d")


def test_lora_record_is_a_below_a_then_scaled_b_transposed_side_by_side() -> None:
    a, b = torch.randn(1, 6), torch.randn(3, 1)
    wide = (torch.randn(2, 6), torch.randn(8, 2))
    weights = AdapterWeights("lora", "lora", {K1: (a, b), UP0: wide}, {K1: 4.0, UP0: 1.0})
    packed = pack_adapter(weights, SHAPE, "d", torch.float32)
    assert packed.spec.basis_id is None
    offset = lora.record_offset(SHAPE, 2, 1, "qkv")
    a_rows = packed.data[offset : offset + 3 * 2 * 6].view(3, 2, 6)
    bt = packed.data[offset + 36 : offset + 36 + 2 * 12].view(2, 12)
    assert torch.equal(a_rows[1, :1], a)
    assert torch.equal(bt[:1, 6:9], 4 * b.T)
    assert packed.data.count_nonzero() == 6 + 3 + 12 + 16


def test_a_record_is_as_long_as_its_last_part_ends() -> None:
    assert core.packed_elements(SHAPE, 3) == core.record_offset(SHAPE, 3, 2, "q_proj")
    assert fold.packed_elements(SHAPE, 3) == fold.record_offset(SHAPE, 3, 2, "qkv")
    assert lora.packed_elements(SHAPE, 3) == lora.record_offset(SHAPE, 3, 2, "qkv")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scaling_rounds_once(dtype: torch.dtype) -> None:
    r_matrix = torch.randn(2, 2).to(torch.bfloat16)
    weights = AdapterWeights("lora_xs", "core", {K1: (r_matrix,)}, {K1: 1 / 3}, "b")
    packed = pack_adapter(weights, SHAPE, "d", dtype)
    assert packed.data.dtype == dtype
    expected = (r_matrix.double() / 3).to(dtype)
    assert torch.equal(packed.data.view(2, 7, 2, 2)[1, 1], expected)


def test_an_adapter_without_targets_takes_no_room() -> None:
    for family in ("core", "fold", "lora"):
        spec = make_spec(AdapterWeights("x", family, {}, {}, None), SHAPE, "d")  # type: ignore[arg-type]
        assert (spec.rank, spec.packed_elements) == (0, 0)


def test_values_that_overflow_the_banks_dtype_are_refused() -> None:
    weights = AdapterWeights("lora_xs", "core", {K1: (torch.full((1, 1), 4e4),)}, {K1: 2.0}, "b")
    assert pack_adapter(weights, SHAPE, "d", torch.bfloat16).data.isfinite().all()
    with pytest.raises(AdapterRejected, match=r"overflow torch\.float16"):
        pack_adapter(weights, SHAPE, "d", torch.float16)
