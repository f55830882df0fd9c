"""What is set aside for serving itself: figures of a known shape, and what they grow with."""

from dataclasses import fields, replace

import pytest

from shoal.adapters.corrections import BASES_MAX
from shoal.adapters.families.core import RANK_MAX
from shoal.adapters.library import UPLOADED_BASES_MAX
from shoal.adapters.tables import WIDE_BASES_MAX, ActiveFamilies, _Layout
from shoal.server.reserve import (
    CORRECTION_BASES,
    FURTHER_RANK,
    TABLE_BYTES,
    UPLOADED_BASES,
    StepSizes,
    reserve_parts,
)

GIB = 1 << 30
LLAMA_8B = StepSizes(
    tokens=8192,
    rows=256,
    positions=8192,
    item=2,
    hidden=4096,
    intermediate=14336,
    q_size=4096,
    head_dim=128,
    vocab=128_256,
    layers=32,
    outputs=43_008,
    basis_rank=64,
    block_tokens=16,
)


def test_an_8b_model_leaves_most_of_a_card() -> None:
    parts = reserve_parts(LLAMA_8B)
    assert parts["bases"] == (64 + 64 + 7 * 128) * 32 * 43_008 * 2
    assert parts["logits"] == 256 * 128_256 * 6
    assert 2 * GIB < sum(parts.values()) < 6 * GIB


@pytest.mark.parametrize("name", [f.name for f in fields(StepSizes) if f.name != "block_tokens"])
def test_more_of_anything_reserves_more(name: str) -> None:
    more = replace(LLAMA_8B, **{name: 2 * getattr(LLAMA_8B, name)})
    assert sum(reserve_parts(more).values()) > sum(reserve_parts(LLAMA_8B).values())


def test_what_is_set_aside_for_bases_is_what_adapters_may_bring() -> None:
    assert (UPLOADED_BASES, CORRECTION_BASES) == (UPLOADED_BASES_MAX, BASES_MAX)
    assert FURTHER_RANK == RANK_MAX
    # Besides, a registry keeps canonical bases of other ranks, should adapters be on them.
    assert 1 + UPLOADED_BASES + CORRECTION_BASES < WIDE_BASES_MAX


def test_the_tables_of_a_step_fit_in_what_is_set_aside_for_them() -> None:
    everything = ActiveFamilies(64, 8, ("",) * WIDE_BASES_MAX, 64, 64, 64, True)
    assert _Layout(everything, 1024).size <= 1024 * TABLE_BYTES
