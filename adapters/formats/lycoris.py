"""What LoHa and LoKr share: fields, and limits on the explicit factors that they stand for.

Both store a few small matrices whose Hadamard or Kronecker product is ``ΔW``. Such a product of
low-rank matrices is low-rank too, with factors that can be written down exactly, but its rank is
the product of theirs: small files can stand for large factors. Products are made in float64 and
rounded once, to float32.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from shoal.adapters.errors import AdapterRejected, AdapterTooLarge
from shoal.adapters.formats.base import RawAdapter, ReadContext
from shoal.adapters.formats.config_fields import Config, LoraScaling, check_common
from shoal.adapters.formats.keys import NamedTensor
from shoal.adapters.spec import Dims, Target
from shoal.adapters.weights import AdapterWeights

_MERGE = "merge it into a base with `shoal adapters convert --merge`"


def scaling_of(config: Config) -> LoraScaling:
    """``alpha / r`` after the patterns; the field is ``alpha`` here, not ``lora_alpha``.

    Raises:
        AdapterRejected: something that no format serves, or a field that is no number.
    """
    check_common(config)
    return LoraScaling(
        {
            **config,
            "lora_alpha": config.get("alpha", 8),
            "r": config.get("r", 8),
            "use_rslora": False,
        }
    )


class Limits:
    """Counts what the explicit factors of a file will take, before any is made."""

    def __init__(self, context: ReadContext) -> None:
        self._context = context
        self._bytes = 0

    def take(self, named: NamedTensor, rank: int, dims: Dims) -> None:
        """Set aside float32 factors of ``rank``.

        Raises:
            AdapterRejected: the rank is above ``context.max_rank``.
            AdapterTooLarge: all factors together exceed ``context.max_bytes``.
        """
        if rank > self._context.max_rank:
            raise AdapterRejected(
                named.name,
                f"is a factor of a change of rank {rank}, at most {self._context.max_rank} is "
                f"served; {_MERGE}",
            )
        self._bytes += rank * sum(dims) * torch.float32.itemsize
        if self._bytes > self._context.max_bytes:
            raise AdapterTooLarge(
                f"{named.name}: exceeds {self._context.max_bytes} bytes as plain LoRA; {_MERGE}"
            )


def no_tucker(raw: RawAdapter, *kinds: str) -> None:
    """Refuse the core tensors of the Tucker decomposition, which is of convolutions."""
    for parts in raw.targets.values():
        for kind in kinds:
            if kind in parts:
                raise AdapterRejected(
                    parts[kind].name, "is of a Tucker decomposition of convolutions: not served"
                )


def split(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``matrix (m, n)`` as ``(m, k) @ (k, n)`` with an identity on its smaller side."""
    rows, columns = matrix.shape
    if rows <= columns:
        return torch.eye(rows, dtype=matrix.dtype), matrix
    return matrix, torch.eye(columns, dtype=matrix.dtype)


def as_weights(
    name: str, factors: Mapping[Target, tuple[Tensor, Tensor]], scales: Mapping[Target, float]
) -> AdapterWeights:
    """``lora`` weights of float64 ``(A, B)``; AdapterRejected where float32 does not hold them."""
    tensors: dict[Target, tuple[Tensor, ...]] = {}
    for target, (a, b) in factors.items():
        tensors[target] = (a.float(), b.float())
        if not all(bool(torch.isfinite(part).all()) for part in tensors[target]):
            raise AdapterRejected(str(target), "the product of its matrices overflows float32")
    return AdapterWeights(name, "lora", tensors, scales)
