"""``AdapterWeights``: a validated adapter in host memory, where formats and families meet.

A format reader makes it, the registry stores its canonical record, a family packs it for the
device bank. It knows nothing of files, names or devices.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from shoal.adapters.spec import Family, Target

# Returns the base weight ``(d_out, d_in)`` of a target, in the dtype and on the device it is
# served from, in Hugging Face's row order (not GGUF's permuted q/k). Callers must not write to it.
WeightOf = Callable[[Target], Tensor]


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """A validated adapter.

    Attributes:
        format: what it was read from: ``lora_xs``, ``miss``, ``lora``.
        family: how it is served.
        tensors: per target, in the file's dtype, unscaled:
            ``core``  -> ``(R,)`` with ``R (r, r)``;
            ``fold``  -> ``(D,)`` with ``D (r, d_out)`` (``mini`` already tiled);
            ``lora``  -> ``(A, B)`` with ``A (r, d_in)``, ``B (d_out, r)``.
            Targets that are absent are not adapted. Ranks may differ between targets.
        scales: ``s`` per target; multiplies the whole delta.
        basis_id: for ``core``, the basis that ``R`` lives in.
    """

    format: str
    family: Family
    tensors: Mapping[Target, tuple[Tensor, ...]]
    scales: Mapping[Target, float]
    basis_id: str | None = None

    @property
    def rank(self) -> int:
        """Largest rank over the targets: the size of the first axis of R, D or A."""
        return max((parts[0].shape[0] for parts in self.tensors.values()), default=0)
