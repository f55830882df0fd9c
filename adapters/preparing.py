"""From validated weights to what is stored and what is served: an adapter ready to be published.

Pure computing, so that it can be done anywhere: in the server, or beside it (``apart.py``).
"""

from dataclasses import dataclass

import torch

from shoal.adapters.errors import AdapterTooLarge
from shoal.adapters.packing import PackedAdapter, make_spec, pack_adapter
from shoal.adapters.record import from_record, record_digest, to_record
from shoal.adapters.registry.catalog import Content
from shoal.adapters.spec import BaseShape
from shoal.adapters.weights import AdapterWeights


@dataclass(frozen=True, slots=True)
class Prepared:
    """An adapter in all the forms that an upload needs.

    Attributes:
        content: what the catalog says of it.
        record: its canonical bytes.
        packed: what the device bank takes.
    """

    content: Content
    record: bytes
    packed: PackedAdapter


@dataclass(frozen=True, slots=True)
class Packing:
    """How adapters are packed.

    Attributes:
        dtype: that of the device bank.
        max_bytes: of one packed adapter.
    """

    shape: BaseShape
    dtype: torch.dtype
    max_bytes: int

    def prepare(self, weights: AdapterWeights) -> Prepared:
        """The canonical record of ``weights``, and what it is once it is read back.

        Raises:
            AdapterRejected, AdapterTooLarge: it cannot be packed.
        """
        record = to_record(weights)
        digest = record_digest(record)
        # From the record and not from `weights`: what is served now is what a restart serves.
        packed = self.pack(from_record(record, self.shape), digest)
        content = Content(
            digest=digest,
            family=weights.family,
            format=weights.format,
            rank=weights.rank,
            bytes=len(record),
            packed_elements=packed.spec.packed_elements,
            basis_id=packed.spec.basis_id,
        )
        return Prepared(content, record, packed)

    def pack(self, weights: AdapterWeights, digest: str) -> PackedAdapter:
        """Pack ``weights``; raises as ``prepare``."""
        spec = make_spec(weights, self.shape, digest)
        size = spec.packed_elements * self.dtype.itemsize
        # Before allocating: one target of a high rank makes a small file and a vast packed adapter.
        if size > self.max_bytes:
            raise AdapterTooLarge(
                f"the adapter takes {size} bytes in memory (rank {spec.rank} on every module); "
                f"this server has room for {self.max_bytes}"
            )
        return pack_adapter(weights, self.shape, digest, self.dtype)
