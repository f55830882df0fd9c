"""What an adapter changes, spelled out: ``ΔW`` of each target, of every family. Offline.

Merging adds it to a base, projecting measures what another family keeps of it. Serving never makes
a ``ΔW``: that is what families are for.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.adapters.basis import Basis
from shoal.adapters.spec import BaseShape, Target
from shoal.adapters.weights import AdapterWeights, WeightOf

# What is to be added to a weight ``(d_out, d_in)``, given it in float32 or float64.
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class BaseParts:
    """What adapters leave out because it belongs to their base.

    Attributes:
        shape, weight_of: the base.
        basis_of: a basis by its id; KeyError if there is none. Only ``core`` and corrections ask.
        singular_of: the thin SVD ``(U, σ, V)`` of a target's weight. Only ``spectral`` asks.
    """

    shape: BaseShape
    weight_of: WeightOf
    basis_of: Callable[[str], Basis]
    singular_of: Callable[[Target], tuple[Tensor, Tensor, Tensor]]


def changes(weights: AdapterWeights, base: BaseParts) -> dict[Target, Change]:
    """``ΔW`` of every target that the adapter changes, as functions of its weight.

    They compute in the weight's dtype, and whatever depends on W (LoRA-XS, corrections, row scales)
    uses the W they are given.

    Raises:
        KeyError: the basis of the adapter or of its correction is unknown.
    """
    found: dict[Target, Change] = {}
    for target in weights.tensors:
        own = _own(weights, base, target)
        removed = _removed(weights, base, target)
        if removed is not None:
            own = _sum(own, removed)
        if target in weights.row_scales:
            own = _row_scaled(own, weights.row_scales[target])
        found[target] = own
    return found


def _own(weights: AdapterWeights, base: BaseParts, target: Target) -> Change:
    """``ΔW`` of the family alone."""
    parts, scale = weights.tensors[target], weights.scales[target]
    if weights.family == "lora":
        a, b = parts
        return lambda w: scale * (b.to(w.dtype) @ a.to(w.dtype))
    if weights.family == "fold":
        columns = torch.arange(base.shape.dims[target.module].d_in) % parts[0].shape[0]
        return lambda w: scale * parts[0].T[:, columns].to(w.dtype)
    if weights.family == "core":
        assert weights.basis_id is not None
        return _within(base.basis_of(weights.basis_id), target, parts[0], scale)
    rows, entries, values = parts

    def spectral(w: Tensor) -> Tensor:
        u, _, v = (part.to(w.dtype) for part in base.singular_of(target))
        index = torch.stack([rows, entries]).long()
        size = (u.shape[1], v.shape[1])
        m = torch.sparse_coo_tensor(index, values.to(w.dtype), size, check_invariants=True)
        delta: Tensor = scale * (u @ torch.sparse.mm(m, v.T))
        return delta

    return spectral


def _removed(weights: AdapterWeights, base: BaseParts, target: Target) -> Change | None:
    """What the correction takes away, or None."""
    correction = weights.correction
    if correction is None or not correction.ranks.get(target):
        return None
    turned = -torch.eye(correction.ranks[target])
    return _within(base.basis_of(correction.basis_id), target, turned, correction.scales[target])


def _within(basis: Basis, target: Target, r: Tensor, scale: float) -> Change:
    """``s B R BᵀW``."""
    b = basis.factors[target][:, : r.shape[0]]

    def added(w: Tensor) -> Tensor:
        wide = b.to(w.dtype)
        return scale * (wide @ (r.to(w.dtype) @ (wide.T @ w)))

    return added


def _sum(one: Change, two: Change) -> Change:
    return lambda w: one(w) + two(w)


def _row_scaled(change: Change, g: Tensor) -> Change:
    """``diag(g)(W + Δ) − W``."""

    def added(w: Tensor) -> Tensor:
        wide = g.to(w.dtype)[:, None]
        return (wide - 1.0) * w + wide * change(w)

    return added
