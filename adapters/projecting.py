"""Any adapter as LoRA-XS on its base's canonical basis, as well as that can say it. Offline.

LoRA-XS reaches ``ΔW = B R BᵀW`` with the base's own ``B``: the best ``R`` for a given ``ΔW`` is a
least-squares fit, in float64. What lies outside the span is lost, and how much that is, is told:
an adapter that was trained freely mostly lies outside.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.adapters.basis import Basis
from shoal.adapters.deltas import BaseParts, changes
from shoal.adapters.spec import Target
from shoal.adapters.weights import AdapterWeights


@dataclass(frozen=True, slots=True)
class Projection:
    """The result.

    Attributes:
        r: ``(k, k)`` float32 per target, for scale 1, ``k = min(rank, d_out, d_in)``.
        errors: ``‖ΔW − B R BᵀW‖_F`` per target, of the float32 ``R``.
        norms: ``‖ΔW‖_F``.
    """

    r: dict[Target, Tensor]
    errors: dict[Target, float]
    norms: dict[Target, float]

    def relative(self, target: Target) -> float:
        """The share of a target's change that is lost, 0 to 1."""
        return _ratio(self.errors[target], self.norms[target])

    @property
    def total(self) -> float:
        """The same of all targets together."""
        return _ratio(_length(self.errors), _length(self.norms))


@torch.no_grad()
def project(weights: AdapterWeights, base: BaseParts, basis: Basis, rank: int) -> Projection:
    """The nearest LoRA-XS adapter.

    Args:
        weights: of any family.
        base: what they are relative to.
        basis: the canonical one; its leading ``rank`` columns are used.
        rank: at most the basis'.
    """
    found = Projection({}, {}, {})
    for target, change in changes(weights, base).items():
        w = base.weight_of(target).detach().cpu().double()
        delta = change(w)
        b = basis.factors[target][:, : min(rank, *w.shape)].double()
        a = b.T @ w
        # B is orthonormal to 1e-7: Bᵀ is its pseudo-inverse. A's singular values are W's largest.
        r = (b.T @ delta @ torch.linalg.pinv(a)).float()
        found.r[target] = r
        found.errors[target] = float((delta - b @ (r.double() @ a)).norm())
        found.norms[target] = float(delta.norm())
    return found


def _length(parts: dict[Target, float]) -> float:
    return float(sum(part**2 for part in parts.values()) ** 0.5)


def _ratio(error: float, norm: float) -> float:
    return error / norm if norm else 0.0
