"""What the fused kernels share: the order of h, the checks, and the deferred norm as a chain."""

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.kernels.add_residual.kernel import launch_add_residual
from shoal.kernels.core_apply.epilogue import (
    CoreEpilogue,
    CoreRows,
    MixedEpilogue,
    RowScale,
    check_epilogue,
    check_scale,
    unchunk,
)
from shoal.kernels.core_apply.epilogue_cases import (
    ALIGNED,
    MIXED_RANKS,
    CoreCase,
    chunked,
    defined_mix,
    make_rows,
    widen,
)
from shoal.kernels.core_project.kernel import launch_core_mix, launch_core_project
from shoal.kernels.errors import ShapeError
from shoal.kernels.rope_kv.kernel import launch_rope_kv
from shoal.kernels.rope_kv.reference import rotation_table
from shoal.kernels.silu_mul.kernel import launch_silu_mul
from shoal.kernels.testing import assert_close, random

DEVICE = torch.device("cuda" if "SHOAL_TEST_GPU" in os.environ else "cpu")
EPS = 1e-5


def test_h_lies_in_blocks_of_16_columns_module_after_module() -> None:
    # Two modules of 32 columns: block 0 of each, then block 1 of each.
    names = torch.arange(64).view(1, 2, 32)  # module 0 is 0 to 31
    row = chunked(names)[0].tolist()
    assert row[:16] == list(range(16))
    assert row[16:32] == list(range(32, 48))
    assert row[32:48] == list(range(16, 32))
    assert torch.equal(unchunk(chunked(names), 2, 32), names)
    # A step that needs 16 columns reads the first 32 of the same row.
    assert torch.equal(unchunk(chunked(names)[:, :32], 2, 16), names[:, :, :16])


def spoiled_rows(rows: CoreRows, argument: str) -> dict[str, object]:
    wrong = {
        "arena": rows.arena.double(),
        "addresses": rows.addresses.int(),
        "ranks": rows.ranks[:-1],
        "firsts": rows.firsts.long(),
        "columns": 48,
        "alignment": 3,
    }
    return {argument: wrong[argument]}


@pytest.mark.parametrize(
    "argument", ["arena", "addresses", "ranks", "firsts", "columns", "alignment"]
)
def test_wrong_rows_are_refused_when_they_are_made(argument: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, _ = make_rows(ALIGNED, 5, 1, torch.float32, DEVICE, generator)
    with pytest.raises(ShapeError) as caught:
        replace(rows, **spoiled_rows(rows, argument))
    assert caught.value.argument == argument


def test_wrong_epilogues_are_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    y0 = random((5, 40), generator, torch.float32).to(DEVICE)
    source, core = widen(y0, ALIGNED, (20, 20), generator)
    assert isinstance(core, CoreEpilogue)
    check_epilogue(core, "y", source, (20, 20))
    wide = replace(core, rows=replace(core.rows, columns=64))
    mixed = MixedEpilogue(torch.zeros((2, 5, 2, 32), device=DEVICE), core.basis)
    check_epilogue(mixed, "y", source, (20, 20))
    for argument, wrong in (
        ("columns", wide),
        ("basis", replace(core, basis=core.basis[:31])),
        ("basis", replace(core, basis=core.basis.t().contiguous().t())),
        ("h_column", replace(core, h_column=39)),
        ("y", replace(core, h_column=41)),
        ("matrix", replace(core, matrix=-1)),
        ("mixed", replace(mixed, mixed=mixed.mixed[..., :31])),
        ("mixed", replace(mixed, mixed=mixed.mixed[:, :4])),
        ("mixed", replace(mixed, mixed=mixed.mixed.double())),
        ("mixed", replace(mixed, mixed=mixed.mixed.transpose(0, 1).contiguous().transpose(0, 1))),
    ):
        with pytest.raises(ShapeError) as caught:
            check_epilogue(wrong, "y", source, (20, 20))
        assert caught.value.argument == argument


def test_wrong_scales_are_refused() -> None:
    source = torch.zeros((5, 8), device=DEVICE)
    good = RowScale(torch.ones((2, 5), device=DEVICE), 8, EPS)
    check_scale(good, "y", source)
    for argument, wrong in (
        ("sums", replace(good, sums=good.sums[:, :4])),
        ("sums", replace(good, sums=good.sums.double())),
        ("sums", replace(good, sums=torch.ones((65, 5), device=DEVICE))),
        ("width", replace(good, width=0)),
    ):
        with pytest.raises(ShapeError) as caught:
            check_scale(wrong, "y", source)
        assert caught.value.argument == argument


class Linear:
    """A linear of several modules with its widened rows, adapters, and both in float64."""

    def __init__(
        self, case: CoreCase, tokens: int, k: int, widths: tuple[int, ...], seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        n, modules = sum(widths), len(widths)
        self.case, self.widths, self.modules, self.n = case, widths, modules, n
        self.rows, _ = make_rows(case, tokens, modules, torch.float32, DEVICE, generator)
        self.weight = random((n, k), generator, torch.float32, k**-0.5).to(DEVICE)
        basis = random((case.columns, n), generator, torch.float32, n**-0.5)
        self.basis = basis.to(DEVICE)
        pieces = zip(self.weight.split(widths), self.basis.split(widths, dim=1), strict=True)
        a = torch.stack([b @ w for w, b in pieces])  # A = Bᵀ W, (modules, columns, k)
        self.projection = chunked(a.permute(2, 0, 1).contiguous()).t().contiguous()
        self.widened = torch.cat((self.weight, self.projection))

    def plain(self, x: Tensor) -> Tensor:
        """``x Wᵀ + (x Aᵀ Rᵀ) Bᵀ`` in float64."""
        h = unchunk(x @ self.projection.double().t(), self.modules, self.case.columns)
        mixed = defined_mix(h, self.rows, self.case.matrix)
        bases = self.basis.double().split(self.widths, dim=1)
        deltas = torch.cat([mixed[:, m] @ basis for m, basis in enumerate(bases)], dim=1)
        return x @ self.weight.double().t() + deltas

    def fused(self, x: Tensor, how: str) -> tuple[Tensor, CoreEpilogue | MixedEpilogue]:
        """The GEMM, and the epilogue for what follows it."""
        named = {"modules": self.modules, "matrix": self.case.matrix}
        if how == "project":
            mixed = launch_core_project(x, self.projection, self.rows, **named)
            return F.linear(x, self.weight), MixedEpilogue(mixed, self.basis)
        y = F.linear(x, self.widened)
        if how == "mix":
            mixed = launch_core_mix(y, self.n, self.rows, **named)
            return y, MixedEpilogue(mixed, self.basis)
        return y, CoreEpilogue(self.rows, self.basis, self.n, self.case.matrix)


@pytest.mark.parametrize("how", ["inline", "mix", "project"])
@pytest.mark.parametrize("case", [MIXED_RANKS, ALIGNED], ids=["mixed ranks", "aligned"])
def test_a_deferred_norm_equals_the_plain_formulas(case: CoreCase, how: str) -> None:
    # down's output -> residual -> norm -> gate_up -> SiLU, and the same residual -> qkv -> q, k, v.
    tokens, hidden, width, heads, dim = 21, 288, 40, 2, 16
    generator = torch.Generator().manual_seed(1)

    def normal(*size: int) -> Tensor:
        return random(size, generator, torch.float32).to(DEVICE)

    down = Linear(case, tokens, 48, (hidden,), seed=2)
    gate_up = Linear(case, tokens, hidden, (width, width), seed=3)
    qkv = Linear(case, tokens, hidden, (heads * dim, dim, dim), seed=4)
    residual, inner, bias = normal(tokens, hidden), normal(tokens, 48), normal(4 * dim)
    weight = normal(hidden) * 0.1 + 1.0
    positions = torch.arange(tokens, device=DEVICE)
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, dim, 2) / dim)
    rotations = rotation_table(frequencies, torch.arange(tokens)).to(DEVICE)

    stream = residual.double() + down.plain(inner.double())
    normed = stream / (stream.square().mean(1, keepdim=True) + EPS).sqrt() * weight
    gate, up = gate_up.plain(normed).chunk(2, dim=1)
    expected_silu = gate * torch.sigmoid(gate) * up
    q, k, v = (qkv.plain(normed) + bias).view(tokens, 4, dim).split([heads, 1, 1], dim=1)
    turns = torch.view_as_complex(rotations.double().view(tokens, 2, -1).mT.contiguous())[:, None]

    def rotate(x: Tensor) -> Tensor:
        turned = torch.complex(*x.chunk(2, dim=2)) * turns
        return torch.cat((turned.real, turned.imag), dim=2)

    y, core = down.fused(inner, how)
    x, sums = launch_add_residual(residual, y, weight, core=core)
    scale = RowScale(sums, hidden, EPS)
    y, core = gate_up.fused(x, how)
    silu = launch_silu_mul(y, width, core=core, scale=scale)
    y, core = qkv.fused(x, how)
    caches = torch.zeros((2, tokens, 1, 1, dim), device=DEVICE)
    queries = launch_rope_kv(
        y, heads, positions, rotations, positions, caches[0], caches[1], bias=bias, core=core,
        scale=scale,
    )  # fmt: skip
    # The errors of two GEMMs in a row and of their operands add up.
    assert_close(residual, stream, torch.float32)
    assert_close(silu, expected_silu, torch.float32, slack=3)
    assert_close(queries, rotate(q), torch.float32, slack=3)
    assert_close(caches[0, :, 0], rotate(k), torch.float32, slack=3)
    assert_close(caches[1, :, 0], v, torch.float32, slack=3)
