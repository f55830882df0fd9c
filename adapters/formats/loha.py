"""LoHa: ``ΔW = s (W1a W1b) ⊙ (W2a W2b)``, elementwise.

Tensors ``<module>.hada_w1_a (d_out, r)``, ``hada_w1_b (r, d_in)``, ``hada_w2_a``, ``hada_w2_b``;
``s = alpha / r`` after the patterns. The product of two matrices of rank r has rank ``r²`` at most,
with the columns ``B[:, (i, j)] = W1a[:, i] ⊙ W2a[:, j]`` and the rows ``A[(i, j)] = W1b[i] ⊙
W2b[j]`` (Khatri-Rao); where that exceeds the module's smaller side, ``ΔW`` itself is one factor and
an identity the other. Served as ``lora``.
Source: PEFT 0.10 to 0.21, ``tuners/loha`` (FedPara, arXiv 2108.06098).
"""

from torch import Tensor

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.formats.base import Format, RawAdapter, ReadContext, check_shape
from shoal.adapters.formats.keys import module_path
from shoal.adapters.formats.lycoris import Limits, as_weights, no_tucker, scaling_of, split
from shoal.adapters.spec import Target
from shoal.adapters.weights import AdapterWeights

_TUCKER = ("hada_t1", "hada_t2")
_MATRICES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def _read(raw: RawAdapter, context: ReadContext) -> AdapterWeights:
    scaling = scaling_of(raw.config)
    no_tucker(raw, *_TUCKER)
    limits = Limits(context)
    scales: dict[Target, float] = {}
    stored: dict[Target, tuple[Tensor, ...]] = {}
    for target in raw.targets:
        dims = context.shape.dims[target.module]
        first = raw.matrix(target, "hada_w1_b")
        rank = first.tensor.shape[0]
        if rank < 1:
            raise AdapterRejected(first.name, "must have at least one row")
        shapes = {"a": (dims.d_out, rank), "b": (rank, dims.d_in)}
        stored[target] = tuple(
            check_shape(raw.part(target, kind), *shapes[kind[-1]]) for kind in _MATRICES
        )
        scales[target] = scaling.scale(module_path(target), rank, first.name)
        limits.take(first, min(rank * rank, *dims), dims)
    factors = {target: _factors(*matrices) for target, matrices in stored.items()}
    return as_weights("loha", factors, scales)


def _factors(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> tuple[Tensor, Tensor]:
    """``(A, B)`` in float64."""
    w1_a, w1_b, w2_a, w2_b = (each.double() for each in (w1_a, w1_b, w2_a, w2_b))
    (d_out, rank), d_in = w1_a.shape, w1_b.shape[1]
    if rank * rank > min(d_out, d_in):
        b, a = split((w1_a @ w1_b) * (w2_a @ w2_b))
        return a, b
    b = (w1_a[:, :, None] * w2_a[:, None, :]).view(d_out, -1)
    return (w1_b[:, None, :] * w2_b[None, :, :]).view(-1, d_in), b


FORMAT = Format(
    name="loha",
    markers=frozenset({*_MATRICES, *_TUCKER}),
    kinds=frozenset({*_MATRICES, *_TUCKER}),
    peft_types=frozenset({"LOHA"}),
    read=_read,
)
