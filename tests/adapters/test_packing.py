"""Records are laid out as documented, with the scale folded in."""

import dataclasses

import pytest
import torch

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.families import core, fold, lora, scale
from shoal.adapters.packing import make_spec, pack_adapter
from shoal.adapters.spec import UNIT_ELEMENTS, BaseShape, Dims, Section, Target
from shoal.adapters.weights import AdapterWeights, Correction

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


def corrected(rank_k: int = 2, rank_up: int = 6) -> AdapterWeights:
    """A LoRA of rank 1 on two targets whose base was corrected at other ranks."""
    return AdapterWeights(
        "lora",
        "lora",
        {K1: (torch.ones(1, 6), torch.ones(3, 1)), UP0: (torch.ones(1, 6), torch.ones(8, 1))},
        {K1: 1.0, UP0: 1.0},
        correction=Correction("olora", "c", {K1: rank_k, UP0: rank_up}, {K1: 0.5, UP0: 2.0}),
    )


def test_a_correction_is_a_core_section_of_its_own_before_the_familys() -> None:
    weights = corrected()
    packed = pack_adapter(weights, SHAPE, "d", torch.float32)
    spec = packed.spec
    assert spec == make_spec(weights, SHAPE, "d")
    # 2 layers of 7 modules of 6 x 6 take 504 elements: one unit.
    assert spec.sections == (Section("core", 6, 0, "c"), Section("lora", 1, 1))
    assert (spec.family, spec.rank, spec.basis_id) == ("lora", 1, None)
    assert spec.packed_elements == UNIT_ELEMENTS + lora.packed_elements(SHAPE, 1)
    table = packed.data[:504].view(2, 7, 6, 6)
    assert torch.equal(table[1, 1, :2, :2], -0.5 * torch.eye(2))
    assert torch.equal(table[0, 5], -2.0 * torch.eye(6))
    assert table.count_nonzero() == 8
    assert packed.data[504:UNIT_ELEMENTS].count_nonzero() == 0
    alone = dataclasses.replace(weights, correction=None)
    own = pack_adapter(alone, SHAPE, "d", torch.float32)
    assert torch.equal(packed.data[UNIT_ELEMENTS:], own.data)
    assert own.spec.extra == ()


def test_sections_start_at_units_however_long_they_are() -> None:
    large = dataclasses.replace(SHAPE, num_layers=5)
    packed = pack_adapter(corrected(), large, "d", torch.float32)
    assert UNIT_ELEMENTS < 5 * 7 * 36
    assert [section.unit for section in packed.spec.sections] == [0, 2]
    assert packed.spec.packed_elements == 2 * UNIT_ELEMENTS + lora.packed_elements(large, 1)


def test_row_scales_are_kept_less_one_and_folded_into_b() -> None:
    a, b = torch.randn(2, 6), torch.randn(3, 2)
    up = (torch.randn(2, 6), torch.randn(8, 2))
    g = torch.tensor([1.5, 1.0, 0.25])
    weights = AdapterWeights(
        "dora", "lora", {K1: (a, b), UP0: up}, {K1: 4.0, UP0: 3.0}, row_scales={K1: g}
    )
    packed = pack_adapter(weights, SHAPE, "d", torch.float32)
    assert packed.spec.sections == (Section("scale", 0, 0), Section("lora", 2, 1))
    widths = 2 * (12 + 6 + 16 + 6)
    offset = scale.record_offset(SHAPE, 1, "qkv")
    assert torch.equal(packed.data[offset + 6 : offset + 9], g - 1)
    assert packed.data[:UNIT_ELEMENTS].count_nonzero() == 2
    assert scale.packed_elements(SHAPE) == widths
    own = packed.data[UNIT_ELEMENTS:]
    first = lora.record_offset(SHAPE, 2, 1, "qkv") + 3 * 2 * 6
    bt = own[first : first + 2 * 12].view(2, 12)
    torch.testing.assert_close(bt[:, 6:9], 4 * (g[:, None] * b).T)
    first = lora.record_offset(SHAPE, 2, 0, "gate_up") + 2 * 2 * 6
    assert torch.equal(own[first : first + 2 * 16].view(2, 16)[:, 8:], 3 * up[1].T)


def test_row_scales_near_one_keep_their_digits_in_16_bits() -> None:
    g = 1 + torch.linspace(1e-4, 2e-3, 3, dtype=torch.float64)
    factors = (torch.zeros(1, 6), torch.zeros(3, 1))
    weights = AdapterWeights("dora", "lora", {K1: factors}, {K1: 1.0}, row_scales={K1: g})
    packed = pack_adapter(weights, SHAPE, "d", torch.bfloat16)
    offset = scale.record_offset(SHAPE, 1, "qkv") + 6
    stored = packed.data[offset : offset + 3].double()
    torch.testing.assert_close(stored, g - 1, rtol=2**-8, atol=0)


def test_a_correction_without_a_low_rank_part_still_counts() -> None:
    weights = dataclasses.replace(corrected(), tensors={}, scales={})
    spec = make_spec(weights, SHAPE, "d")
    assert spec.sections == (Section("core", 6, 0, "c"), Section("lora", 0, 1))
    assert pack_adapter(weights, SHAPE, "d", torch.float32).data.count_nonzero() == 8


def test_a_spec_of_a_vast_correction_allocates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*size: int) -> None:
        raise AssertionError(size)

    for name in ("eye", "zeros", "empty"):
        monkeypatch.setattr(torch, name, fail)
    spec = make_spec(corrected(rank_up=1 << 20), SHAPE, "d")
    assert spec.packed_elements > 1 << 40
