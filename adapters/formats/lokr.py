"""LoKr: ``ΔW = s kron(W1, W2)``, each of the two a matrix or a product of two.

Tensors per module ``lokr_w1 (a, c)`` or ``lokr_w1_a (a, k)`` and ``lokr_w1_b (k, c)``, and the
same of ``lokr_w2 (b, d)``, with ``a·b = d_out`` and ``c·d = d_in``; ``s = alpha / r`` after the
patterns. With ``W1 = P1 Q1`` and ``W2 = P2 Q2``, ``kron(W1, W2) = kron(P1, P2) kron(Q1, Q2)``, of
rank ``k1·k2``. A matrix stored whole gets an identity on its smaller side. Served as ``lora``.

Two whole matrices do not show the ``r`` of the scale: it is then what the config gives the module.
Source: PEFT 0.10 to 0.21, ``tuners/lokr`` (LyCORIS, arXiv 2309.14859).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.formats.base import Format, RawAdapter, ReadContext
from shoal.adapters.formats.keys import NamedTensor, module_path, tensor_name
from shoal.adapters.formats.lycoris import Limits, as_weights, no_tucker, scaling_of, split
from shoal.adapters.spec import Dims, Target
from shoal.adapters.weights import AdapterWeights

_KINDS = frozenset(f"lokr_w{i}{part}" for i in (1, 2) for part in ("", "_a", "_b"))
_TUCKER = "lokr_t2"


class _Side(NamedTuple):
    """``W1`` or ``W2`` as stored: one matrix, or two whose product it is."""

    named: NamedTensor
    right: NamedTensor | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.named.tensor.shape[0], (self.right or self.named).tensor.shape[1]

    @property
    def rank(self) -> int:
        """Columns of the first of the two matrices that it will be written as."""
        own = [] if self.right is None else [self.right.tensor.shape[0]]
        return min(*self.shape, *own)

    def factors(self) -> tuple[Tensor, Tensor]:
        """``(rows, rank)`` and ``(rank, columns)`` in float64."""
        left = self.named.tensor.double()
        if self.right is None:
            return split(left)
        right = self.right.tensor.double()
        return (left, right) if left.shape[1] <= min(self.shape) else split(left @ right)


def _read(raw: RawAdapter, context: ReadContext) -> AdapterWeights:
    scaling = scaling_of(raw.config)
    no_tucker(raw, _TUCKER)
    limits = Limits(context)
    scales: dict[Target, float] = {}
    sides: dict[Target, tuple[_Side, _Side]] = {}
    for target in raw.targets:
        dims = context.shape.dims[target.module]
        first, second = _side(raw, target, "lokr_w1"), _side(raw, target, "lokr_w2")
        _check_product(first, second, dims)
        path = module_path(target)
        ranks = {s.right.tensor.shape[0] for s in (first, second) if s.right is not None}
        if len(ranks) > 1:
            raise AdapterRejected(
                second.named.name, f"one module has one rank, but its matrices have {sorted(ranks)}"
            )
        rank = ranks.pop() if ranks else scaling.told_rank(path)
        scales[target] = scaling.scale(path, rank, first.named.name)
        limits.take(first.named, first.rank * second.rank, dims)
        sides[target] = first, second
    factors = {target: _factors(*both) for target, both in sides.items()}
    return as_weights("lokr", factors, scales)


def _side(raw: RawAdapter, target: Target, kind: str) -> _Side:
    present = raw.targets[target]
    pair = (f"{kind}_a", f"{kind}_b")
    if kind not in present and not any(part in present for part in pair):
        raise AdapterRejected(tensor_name(target, kind), "is missing, and so are its two factors")
    if kind in present:
        for part in pair:
            if part in present:
                raise AdapterRejected(present[part].name, f"{kind} is given whole as well")
        return _nonempty(_Side(raw.matrix(target, kind), None))
    left, right = (raw.matrix(target, part) for part in pair)
    if left.tensor.shape[1] != right.tensor.shape[0]:
        raise AdapterRejected(
            right.name,
            f"shape {list(right.tensor.shape)} must have the {left.tensor.shape[1]} rows that "
            f"{pair[0]} has columns",
        )
    return _nonempty(_Side(left, right))


def _nonempty(side: _Side) -> _Side:
    if side.rank < 1:
        raise AdapterRejected(side.named.name, "must not be empty")
    return side


def _check_product(first: _Side, second: _Side, dims: Dims) -> None:
    got = tuple(one * two for one, two in zip(first.shape, second.shape, strict=True))
    if got != dims:
        raise AdapterRejected(
            first.named.name,
            f"the Kronecker product of {list(first.shape)} and {list(second.shape)} is "
            f"{list(got)}, must be {list(dims)}",
        )


def _factors(first: _Side, second: _Side) -> tuple[Tensor, Tensor]:
    """``(A, B)`` in float64."""
    (p1, q1), (p2, q2) = first.factors(), second.factors()
    return torch.kron(q1, q2), torch.kron(p1, p2)


FORMAT = Format(
    name="lokr",
    markers=_KINDS | {_TUCKER},
    kinds=_KINDS | {_TUCKER},
    peft_types=frozenset({"LOKR"}),
    read=_read,
)
