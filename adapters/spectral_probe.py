"""What an SVF or SVFT adapter changes, in sixteen numbers a target, kept in its record.

Its M means something only between the singular vectors that it was read with. Those are kept in a
cache; computed again, they may be turned or flipped differently wherever singular values are equal,
nearly equal or zero (``spectral_basis.py``), and the same M would silently be another change. So a
record holds ``Pᵀ (U M Vᵀ) Q / ‖M‖`` per target, with seeded ``P (d_out, 4)`` and ``Q (d_in, 4)``,
and whoever serves it compares that with the vectors that serve it. It is the change that is
compared, not the vectors: where an adapter treats turned or flipped ones alike, it stays right.

Without the scale, which neither hides nor makes a difference. Divided by M's Frobenius norm, so
that no M leaves the range of float16; and float16, so that what two machines differ by in
rounding seldom makes two records of one upload.
"""

import torch
from torch import Tensor

from shoal.adapters.basis import PROBE_COLUMNS
from shoal.adapters.spec import Target
from shoal.adapters.spectral_basis import Ends, SpectralBasis
from shoal.adapters.weights import AdapterWeights

PROBE_SHAPE = (PROBE_COLUMNS, PROBE_COLUMNS)
PROBE_DTYPE = torch.float16
# Of ‖stored − found‖ to ‖stored‖. Rounding to float16 takes up to 5e-4 (2e-4 measured); another SVD
# routine, where it finds the same vectors, 2e-10 (1536 x 576).
ERROR_MAX = 1e-3


def delta_probes(
    tensors: dict[Target, tuple[Tensor, ...]], basis: SpectralBasis
) -> dict[Target, Tensor]:
    """``AdapterWeights.probes`` of a spectral adapter's entries: ``(4, 4)`` float16 per target.

    Raises:
        OSError: see ``SpectralBasis.factors``.
    """
    return {t: _probe(parts, basis.ends(t)).to(PROBE_DTYPE) for t, parts in tensors.items()}


def changed_target(weights: AdapterWeights, basis: SpectralBasis) -> tuple[Target, float] | None:
    """A target that ``weights``, of a record, would change otherwise than when it was read.

    Returns:
        The first such target and the relative difference of its probe; None if there is none.

    Raises:
        OSError: see ``SpectralBasis.factors``.
    """
    for target, parts in weights.tensors.items():
        stored = weights.probes[target].double()
        error = float((_probe(parts, basis.ends(target)) - stored).norm())
        size = float(stored.norm())
        if not error <= ERROR_MAX * size:
            return target, error / max(size, 1e-30)
    return None


def _probe(parts: tuple[Tensor, ...], ends: Ends) -> Tensor:
    """``(UᵀP)ᵀ M (VᵀQ) / ‖M‖``, ``(4, 4)`` float64; zeros if M is zero."""
    rows, columns, values = parts
    values = values.double()
    size = float(values.norm())
    share = values / size if size > 0 else values
    product: Tensor = (ends.u[rows.long()] * share[:, None]).T @ ends.v[columns.long()]
    return product
