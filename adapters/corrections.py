"""Base corrections: undoing on the shared base what training took out of its own copy.

PiSSA, MiLoRA and OLoRA move a part ``B_r B_rᵀ W`` of the weights into the adapter before they train
it on the rest. On the whole ``W`` such an adapter is its own delta minus that part, and the part
depends on the base alone. So ``B``, for every target, is a shared basis of the base (`Basis`), kept
like the ones that uploads bring, and an adapter says only which one and how many columns.

======  ==========================================================  ======
method  ``B_r``                                                     times
======  ==========================================================  ======
pissa   the ``r`` leading left singular vectors of ``W``            1
milora  the ``r`` last of the thin SVD, smallest value first        1
olora   the first ``r`` columns of ``Q`` in ``W = Q R``             s
======  ==========================================================  ======

All are nested: a smaller rank is the leading columns of a larger one. Only the span of ``B_r``
counts, so neither the signs of a library's columns nor their order within it do.

Sources: PiSSA (arXiv 2404.02948), OLoRA (arXiv 2406.01775): PEFT 0.21, ``tuners/lora/layer.py``.
MiLoRA (arXiv 2406.09044): sufenlp/MiLoRA. They decompose the weights in float32, from the dtype in
which they are stored. Float64 finds the same span to within the error of theirs: the route over
``W Wᵀ`` is blind to singular values below 1e-8 of the largest, float32 to those below 1e-7.
"""

import threading
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from shoal.adapters.basis import Basis, BasisStore, leading_left_vectors, make_basis
from shoal.adapters.families import core
from shoal.adapters.spec import BaseShape, Target
from shoal.adapters.weights import (
    CORRECTION_METHODS,
    AdapterWeights,
    Correction,
    CorrectionMethod,
    WeightOf,
)

# How many bases of one base the corrections may bring, beside the canonical one and those of
# uploads: one a method, if none exceeds rank 64. Further ones become explicit factors.
BASES_MAX = 3
RANK_STEP = 64

# Two uploads must not both spend minutes on the same basis.
_COMPUTING = threading.Lock()

Ranks = Mapping[Target, int]


def shared_basis(
    method: CorrectionMethod,
    ranks: Ranks,
    *,
    shape: BaseShape,
    weight_of: WeightOf,
    canonical: Basis,
    bases: BasisStore,
) -> Basis | None:
    """The basis that holds these corrections, durably kept when this returns.

    The canonical one where it is enough (PiSSA), else a known one, else one that is computed now
    for every target of the base: a decomposition of each weight, as for the canonical basis.

    Args:
        method: what the factors are.
        ranks: columns needed, at most ``min(d_out, d_in)`` of each target.
        shape, weight_of, canonical: the base.
        bases: the known ones; gets what is computed.

    Returns:
        None when there is no room for a further basis, or a rank exceeds ``core.RANK_MAX``.
    """
    find = partial(known_basis, method, ranks, shape=shape, canonical=canonical, bases=bases)
    known = find()
    if known is not None:
        bases.add(known)  # the canonical one may be in a cache only
        return known
    with _COMPUTING:
        known = find()
        if known is not None:
            return known
        rank = -(-max(ranks.values(), default=1) // RANK_STEP) * RANK_STEP
        taken = sum(b.kind in CORRECTION_METHODS for b in _of_base(bases, shape))
        if rank > core.RANK_MAX or taken >= BASES_MAX:
            return None
        made = make_basis(
            {t: columns(method, weight_of(t), t, rank) for t in shape.targets()},
            kind=method,
            base_digest=shape.digest,
        )
        return made if bases.add(made, limit=BASES_MAX) else None


def known_basis(
    method: CorrectionMethod, ranks: Ranks, *, shape: BaseShape, canonical: Basis, bases: BasisStore
) -> Basis | None:
    """The smallest known basis that holds these corrections; the canonical one before others."""
    if method == "pissa" and _covers(canonical, ranks):
        return canonical
    fitting = [b for b in _of_base(bases, shape) if b.kind == method and _covers(b, ranks)]
    return min(fitting, key=lambda basis: basis.rank, default=None)


def _of_base(bases: BasisStore, shape: BaseShape) -> list[Basis]:
    return [basis for basis in bases.all() if basis.base_digest == shape.digest]


def _covers(basis: Basis, ranks: Ranks) -> bool:
    return all(
        target in basis.factors and basis.factors[target].shape[1] >= rank
        for target, rank in ranks.items()
    )


def columns(method: CorrectionMethod, weight: Tensor, target: Target, rank: int) -> Tensor:
    """``B`` of one target: ``(d_out, min(rank, d_out, d_in))``, float32, on the CPU.

    Args:
        weight: ``(d_out, d_in)`` in the dtype it is stored in; the work is done on its device.
        target: whose it is.
    """
    if method == "pissa":
        return leading_left_vectors(weight, target, rank)
    found = _trailing(weight, rank) if method == "milora" else _orthogonal(weight, rank)
    return found.cpu().float()


@torch.no_grad()
def _trailing(weight: Tensor, rank: int) -> Tensor:
    w = weight.detach().to(torch.float64)
    d_out, d_in = w.shape
    if d_out <= d_in:
        vectors: Tensor = torch.linalg.eigh(w @ w.T).eigenvectors
        return vectors[:, :rank]
    right = torch.linalg.eigh(w.T @ w).eigenvectors.flip(1)
    # W V = U Σ, largest first, so that QR keeps the columns that belong to tiny values, of which
    # rounding leaves no direction, orthogonal to all larger ones.
    u: Tensor = torch.linalg.qr(w @ right).Q
    return u.flip(1)[:, :rank]


@torch.no_grad()
def _orthogonal(weight: Tensor, rank: int) -> Tensor:
    # The first columns of Q depend on the first columns of W only.
    w = weight.detach()[:, : min(rank, *weight.shape)].to(torch.float64)
    q: Tensor = torch.linalg.qr(w).Q
    return q


def corrected(
    weights: AdapterWeights,
    method: CorrectionMethod,
    ranks: Ranks,
    *,
    shape: BaseShape,
    weight_of: WeightOf,
    canonical: Basis,
    bases: BasisStore,
) -> AdapterWeights | None:
    """A ``lora`` adapter with its correction on a shared basis; None when there is none for it."""
    basis = shared_basis(
        method, ranks, shape=shape, weight_of=weight_of, canonical=canonical, bases=bases
    )
    if basis is None:
        return None
    correction = Correction(method, basis.id, ranks, correction_scales(weights, method))
    return AdapterWeights(
        weights.format, "lora", weights.tensors, weights.scales, correction=correction
    )


def correction_scales(weights: AdapterWeights, method: CorrectionMethod) -> dict[Target, float]:
    """What the removed parts are multiplied by, per target."""
    if method == "olora":
        return {target: weights.scales[target] for target in weights.tensors}
    return dict.fromkeys(weights.tensors, 1.0)


@torch.no_grad()
def explicit(
    weights: AdapterWeights,
    method: CorrectionMethod,
    ranks: Ranks,
    weight_of: WeightOf,
    known: Basis | None = None,
    scales: Mapping[Target, float] | None = None,
) -> AdapterWeights:
    """A ``lora`` adapter whose own factors hold the correction: ``[A; BᵀW]``, ``[s·B, -c·B_r]``.

    Float32, scale 1. Ranks grow by the correction's; see `explicit_bytes`. ``known`` is the
    `known_basis` of the correction, without which its columns are computed; ``scales`` are its
    own, by default what the method says.
    """
    times = correction_scales(weights, method) if scales is None else scales
    tensors: dict[Target, tuple[Tensor, ...]] = {}
    for target, (a, b) in weights.tensors.items():
        weight = weight_of(target)
        if known is None:
            removed = columns(method, weight, target, ranks[target])
        else:
            removed = known.factors[target][:, : ranks[target]]
        wide = removed.to(weight.device, torch.float64)
        kept = (wide.T @ weight.to(torch.float64)).cpu()
        scaled = b.double() * weights.scales[target]
        tensors[target] = (
            torch.cat([a.float(), kept.float()]),
            torch.cat([scaled.float(), -times[target] * removed], dim=1),
        )
    return AdapterWeights(weights.format, "lora", tensors, dict.fromkeys(tensors, 1.0))


def explicit_bytes(weights: AdapterWeights, ranks: Ranks) -> int:
    """Bytes of the tensors that `explicit` makes."""
    return 4 * sum(
        (a.shape[0] + ranks[target]) * (a.shape[1] + b.shape[0])
        for target, (a, b) in weights.tensors.items()
    )
