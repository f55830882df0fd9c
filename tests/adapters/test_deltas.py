"""``deltas`` and ``projecting``: ΔW of every family is what its definition says, and how much of it
LoRA-XS keeps."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shoal.adapters.basis import Basis, compute_basis
from shoal.adapters.converting import ConversionError, as_lora
from shoal.adapters.deltas import BaseParts, changes
from shoal.adapters.projecting import project
from shoal.adapters.spec import MODULES, BaseShape, Dims, Target
from shoal.adapters.weights import AdapterWeights, Correction

HIDDEN, INNER, KV = 12, 15, 5
DIMS = {
    "q_proj": Dims(HIDDEN, HIDDEN),
    "k_proj": Dims(KV, HIDDEN),
    "v_proj": Dims(KV, HIDDEN),
    "o_proj": Dims(HIDDEN, HIDDEN),
    "gate_proj": Dims(INNER, HIDDEN),
    "up_proj": Dims(INNER, HIDDEN),
    "down_proj": Dims(HIDDEN, INNER),
}
SHAPE = BaseShape("tiny", "d" * 64, 1, DIMS)
GENERATOR = torch.Generator().manual_seed(0)
WEIGHTS = {t: torch.randn(*DIMS[t.module], generator=GENERATOR) for t in SHAPE.targets()}
BASIS = compute_basis(WEIGHTS.__getitem__, SHAPE, 5)
# Targets of three shapes: square, fewer outputs, fewer inputs.
TARGETS = (Target(0, "q_proj"), Target(0, "k_proj"), Target(0, "gate_proj"))
SCALES = {TARGETS[0]: 1.5, TARGETS[1]: -0.25, TARGETS[2]: 3.0}


def svd(target: Target) -> tuple[Tensor, Tensor, Tensor]:
    u, sigma, vt = torch.linalg.svd(WEIGHTS[target].double(), full_matrices=False)
    return u, sigma, vt.T


def basis_of(basis_id: str) -> Basis:
    return {BASIS.id: BASIS}[basis_id]


BASE = BaseParts(SHAPE, WEIGHTS.__getitem__, basis_of, svd)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def lora() -> AdapterWeights:
    ab = {t: (noise(3, DIMS[t.module].d_in), noise(DIMS[t.module].d_out, 3)) for t in TARGETS}
    return AdapterWeights("lora", "lora", ab, SCALES)


def core() -> AdapterWeights:
    r = {t: (noise(4, 4),) for t in TARGETS}
    return AdapterWeights("lora_xs", "core", r, SCALES, BASIS.id)


def corrected() -> AdapterWeights:
    ranks = {TARGETS[0]: 5, TARGETS[1]: 2, TARGETS[2]: 1}
    times = dict(zip(TARGETS, (1.0, 0.5, 2.0), strict=True))
    return replace(lora(), correction=Correction("pissa", BASIS.id, ranks, times))


def dora() -> AdapterWeights:
    # The third target has factors but no magnitudes.
    return replace(lora(), row_scales={t: noise(DIMS[t.module].d_out) for t in TARGETS[:2]})


def fold() -> AdapterWeights:
    d = {
        t: (noise(rank, DIMS[t.module].d_out),) for t, rank in zip(TARGETS, (5, 4, 12), strict=True)
    }
    return AdapterWeights("miss", "fold", d, SCALES)


def spectral() -> AdapterWeights:
    entries = {
        t: (
            torch.tensor([0, 1, 1, 4], dtype=torch.int32),
            torch.tensor([2, 0, 1, 4], dtype=torch.int32),
            noise(4),
        )
        for t in TARGETS
    }
    return AdapterWeights("svft", "spectral", entries, SCALES, "svd")


def expected(weights: AdapterWeights, target: Target) -> Tensor:
    """ΔW in float64, entry by entry or from the formula of the design."""
    w, s = WEIGHTS[target].double(), weights.scales[target]
    parts = [part.double() for part in weights.tensors[target]]
    if weights.family == "fold":
        rank = len(parts[0])
        return s * torch.stack([parts[0][j % rank] for j in range(w.shape[1])], dim=1)
    if weights.family == "core":
        b = BASIS.factors[target][:, : len(parts[0])].double()
        return s * b @ parts[0] @ b.T @ w
    if weights.family == "spectral":
        u, _, v = svd(target)
        m = torch.zeros(u.shape[1], u.shape[1], dtype=torch.float64)
        for i, j, value in zip(*weights.tensors[target], strict=True):
            m[int(i), int(j)] += float(value)
        return s * u @ m @ v.T
    delta = s * parts[1] @ parts[0]
    if weights.correction is not None:
        b = BASIS.factors[target][:, : weights.correction.ranks[target]].double()
        delta = delta - weights.correction.scales[target] * b @ b.T @ w
    g = weights.row_scales.get(target)
    return delta if g is None else g.double()[:, None] * (w + delta) - w


ALL = [lora(), core(), corrected(), dora(), fold(), spectral()]
LOW_RANK = [each for each in ALL if each.family != "spectral" and not each.row_scales]


@pytest.mark.parametrize("weights", ALL, ids=lambda w: w.format + "+" * bool(w.correction))
def test_changes_are_the_definitions(weights: AdapterWeights) -> None:
    found = changes(weights, BASE)
    assert set(found) == set(TARGETS)
    for target, change in found.items():
        want = expected(weights, target)
        torch.testing.assert_close(change(WEIGHTS[target].double()), want, rtol=1e-9, atol=1e-9)
        single = change(WEIGHTS[target])
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", LOW_RANK, ids=lambda w: w.format + "+" * bool(w.correction))
def test_as_lora_keeps_the_delta(weights: AdapterWeights) -> None:
    plain = as_lora(weights, BASE)
    assert (plain.family, plain.correction, plain.row_scales) == ("lora", None, {})
    for target, (a, b) in plain.tensors.items():
        got = plain.scales[target] * b.double() @ a.double()
        torch.testing.assert_close(got, expected(weights, target), rtol=1e-5, atol=1e-5)


def test_a_correction_adds_its_rank() -> None:
    plain = as_lora(corrected(), BASE)
    assert [plain.tensors[t][0].shape[0] for t in TARGETS] == [8, 5, 4]


@pytest.mark.parametrize("weights", [dora(), spectral()], ids=["dora", "svft"])
def test_what_is_not_low_rank_is_not_written_as_lora(weights: AdapterWeights) -> None:
    with pytest.raises(ConversionError, match="is not low-rank") as caught:
        as_lora(weights, BASE)
    assert "--merge" in caught.value.hint


def test_unknown_bases_are_told() -> None:
    with pytest.raises(KeyError):
        changes(replace(core(), basis_id="other"), BASE)


# ----------------------------------------------------------------------------------- projecting


def test_projecting_lora_xs_gives_it_back() -> None:
    weights = core()
    found = project(weights, BASE, BASIS, 4)
    for target, r in found.r.items():
        want = weights.scales[target] * weights.tensors[target][0]
        torch.testing.assert_close(r, want, rtol=1e-4, atol=1e-5)
        assert found.relative(target) < 1e-6
    assert found.total < 1e-6


@pytest.mark.parametrize("weights", ALL, ids=lambda w: w.format + "+" * bool(w.correction))
def test_projections_are_the_nearest(weights: AdapterWeights) -> None:
    found = project(weights, BASE, BASIS, 3)
    errors = norms = 0.0
    for target, r in found.r.items():
        w, delta = WEIGHTS[target].double(), expected(weights, target)
        b = BASIS.factors[target][:, :3].double()
        left = delta - b @ r.double() @ b.T @ w
        assert found.relative(target) == pytest.approx(float(left.norm() / delta.norm()))
        assert 0 < found.relative(target) <= 1
        errors, norms = errors + float(left.norm()) ** 2, norms + float(delta.norm()) ** 2
        # Nothing of the residual is in reach: it is orthogonal to B E BᵀW for every E.
        inside = b.T @ left @ (b.T @ w).T
        assert float(inside.norm()) < 1e-4 * float(delta.norm()) * float((b.T @ w).norm())
    assert found.total == pytest.approx((errors / norms) ** 0.5)


def test_an_adapter_that_changes_nothing_loses_nothing() -> None:
    zero = {t: (a, torch.zeros_like(b)) for t, (a, b) in lora().tensors.items()}
    found = project(replace(lora(), tensors=zero), BASE, BASIS, 2)
    assert found.total == found.relative(TARGETS[0]) == 0.0


def test_ranks_are_limited_by_small_weights() -> None:
    found = project(lora(), BASE, BASIS, 5)
    assert found.r[Target(0, "k_proj")].shape == (KV, KV)
    assert set(MODULES) >= {target.module for target in found.r}
