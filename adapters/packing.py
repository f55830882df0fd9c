"""From validated weights to the one contiguous record that the device bank takes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.families import core, fold, lora
from shoal.adapters.spec import AdapterSpec, BaseShape
from shoal.adapters.weights import AdapterWeights


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter as it lies in the bank.

    Attributes:
        spec: what the engine knows of it.
        data: 1-D, ``spec.packed_elements`` long, in the bank's dtype, in host memory.
    """

    spec: AdapterSpec
    data: Tensor

    @property
    def num_bytes(self) -> int:
        return self.data.numel() * self.data.element_size()


def make_spec(weights: AdapterWeights, shape: BaseShape, digest: str) -> AdapterSpec:
    """What the engine needs to know of ``weights``; allocates nothing.

    ``rank`` is the rank the record is packed at: the largest of the targets' ranks, and for
    ``fold`` their least common multiple.

    Raises:
        AdapterRejected: ``fold`` ranks whose least common multiple is too large.
    """
    rank = weights.rank
    if weights.family == "core":
        elements = core.packed_elements(shape, rank)
    elif weights.family == "fold":
        rank = fold.packed_rank(weights)
        elements = fold.packed_elements(shape, rank)
    else:
        elements = lora.packed_elements(shape, rank)
    return AdapterSpec(
        digest=digest,
        family=weights.family,
        rank=rank,
        basis_id=weights.basis_id if weights.family == "core" else None,
        packed_elements=elements,
    )


def pack_adapter(
    weights: AdapterWeights, shape: BaseShape, digest: str, dtype: torch.dtype
) -> PackedAdapter:
    """Pack ``weights`` with the scale folded in.

    Args:
        digest: sha256 (hex) of the canonical record.
        dtype: the bank's.

    Raises:
        AdapterRejected: a value is beyond what ``dtype`` holds, or see ``make_spec``.
    """
    spec = make_spec(weights, shape, digest)
    data = torch.empty(spec.packed_elements, dtype=dtype)
    if weights.family == "core":
        core.pack(weights, shape, data)
    elif weights.family == "fold":
        fold.pack(weights, shape, data)
    else:
        lora.pack(weights, shape, data)
    if not bool(torch.isfinite(data).all()):
        raise AdapterRejected("adapter_model.safetensors", f"scaled values overflow {dtype}")
    return PackedAdapter(spec, data)
