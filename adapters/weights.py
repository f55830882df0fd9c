"""``AdapterWeights``: a validated adapter in host memory, where formats and families meet.

A format reader makes it, the registry stores its canonical record, a family packs it for the
device bank. It knows nothing of files, names or devices.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from shoal.adapters.spec import Family, Target

# Returns the base weight ``(d_out, d_in)`` of a target: the checkpoint's values, also where the
# server runs in another dtype, on the device it is served from, in Hugging Face's row order (not
# GGUF's permuted q/k). Callers must not write to it.
WeightOf = Callable[[Target], Tensor]


CorrectionMethod = Literal["pissa", "milora", "olora"]
CORRECTION_METHODS: tuple[CorrectionMethod, ...] = get_args(CorrectionMethod)


@dataclass(frozen=True, slots=True)
class Correction:
    """What training took out of the base before the adapter was trained on the rest.

    Its delta is ``-s·(y0 B_r) B_rᵀ`` per target, with ``B_r`` the first ``rank`` columns of a
    shared basis: PiSSA (``B`` the leading left singular vectors, ``s = 1``), MiLoRA (trailing ones,
    smallest first, ``s = 1``), OLoRA (``Q`` of ``W = Q R``, ``s`` the adapter's scale).

    Attributes:
        method: for people.
        basis_id: the basis, which belongs to the base and is shared by all such adapters.
        ranks, scales: per target.
    """

    method: CorrectionMethod
    basis_id: str
    ranks: Mapping[Target, int]
    scales: Mapping[Target, float]


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """A validated adapter.

    Attributes:
        format: what it was read from, such as ``lora_xs``, ``miss``, ``lora``.
        family: how it is served.
        tensors: per target, in the file's dtype, unscaled:
            ``core``  -> ``(R,)`` with ``R (r, r)``;
            ``fold``  -> ``(D,)`` with ``D (r, d_out)`` (``mini`` already tiled);
            ``lora``  -> ``(A, B)`` with ``A (r, d_in)``, ``B (d_out, r)``;
            ``spectral`` -> ``(rows, cols, values)``, 1-D, equally long, int32, int32 and floating:
            the entries of a sparse ``M (k, k)``, sorted by (row, col) without duplicates;
            ``delta = ((x V) Mᵀ) Uᵀ`` on the thin SVD ``W = U Σ Vᵀ`` of the basis.
            Targets that are absent are not adapted. Ranks may differ between targets.
        scales: ``s`` per target; multiplies the whole delta.
        basis_id: for ``core``, the basis that ``R`` lives in; for ``spectral``, that of ``M``.
        row_scales: ``lora`` only (DoRA): ``g (d_out)`` per target, a subset of the targets;
            ``y = g ⊙ (y0 + s·(x Aᵀ) Bᵀ)``.
        correction: ``lora`` only, and not together with ``row_scales``.
        probes: ``spectral`` only, there for every target: what tells whether singular vectors are
            those it was read with, ``(4, 4)`` float16, see ``spectral_probe.py``.
    """

    format: str
    family: Family
    tensors: Mapping[Target, tuple[Tensor, ...]]
    scales: Mapping[Target, float]
    basis_id: str | None = None
    row_scales: Mapping[Target, Tensor] = field(default_factory=dict)
    correction: Correction | None = None
    probes: Mapping[Target, Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Largest rank over the targets: the size of the first axis of R, D or A.

        Of ``spectral``, the most entries that a target has.
        """
        return max((parts[0].shape[0] for parts in self.tensors.values()), default=0)


class Term(NamedTuple):
    """One adapter of a weighted sum: its deltas, multiplied by ``factor``."""

    weights: AdapterWeights
    factor: float = 1.0


# A sum of deltas; most have one term. Its order decides how sums round, nothing else.
Terms = Sequence[Term]
