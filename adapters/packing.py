"""From validated weights to the one contiguous record that the device bank takes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.families import core, fold, lora, scale, spectral
from shoal.adapters.spec import UNIT_ELEMENTS, AdapterSpec, BaseShape, Section, SectionKind
from shoal.adapters.weights import AdapterWeights


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """An adapter as it lies in the bank.

    Attributes:
        spec: what the engine knows of it.
        data: 1-D, ``spec.packed_elements`` long, in the bank's dtype, in host memory: its sections
            one after the other, with zeros between them.
    """

    spec: AdapterSpec
    data: Tensor

    @property
    def num_bytes(self) -> int:
        return self.data.numel() * self.data.element_size()


def make_spec(weights: AdapterWeights, shape: BaseShape, digest: str) -> AdapterSpec:
    """What the engine needs to know of ``weights``; allocates nothing.

    ``rank`` is the rank the family's section is packed at: the largest of the targets' ranks, and
    for ``fold`` their least common multiple.

    Raises:
        AdapterRejected: ``fold`` ranks whose least common multiple is too large.
    """
    *before, own = _parts(weights, shape)
    extra: list[Section] = []
    unit = 0
    for part in before:
        extra.append(Section(part.kind, part.rank, unit, part.basis_id))
        unit += -(-part.elements // UNIT_ELEMENTS)
    return AdapterSpec(
        digest=digest,
        family=weights.family,
        rank=own.rank,
        basis_id=own.basis_id,
        packed_elements=unit * UNIT_ELEMENTS + own.elements,
        extra=tuple(extra),
        unit=unit,
    )


def pack_adapter(
    weights: AdapterWeights, shape: BaseShape, digest: str, dtype: torch.dtype
) -> PackedAdapter:
    """Pack ``weights`` with the scales folded in.

    Args:
        digest: sha256 (hex) of the canonical record.
        dtype: the bank's.

    Raises:
        AdapterRejected: a value is beyond what ``dtype`` holds, or see ``make_spec``.
    """
    spec = make_spec(weights, shape, digest)
    data = torch.zeros(spec.packed_elements, dtype=dtype)
    for section, part in zip(spec.sections, _parts(weights, shape), strict=True):
        part.fill(data.narrow(0, section.unit * UNIT_ELEMENTS, part.elements))
    if not bool(torch.isfinite(data).all()):
        raise AdapterRejected("adapter_model.safetensors", f"scaled values overflow {dtype}")
    return PackedAdapter(spec, data)


class _Part(NamedTuple):
    """A section to be: how much it takes, and what writes it there."""

    kind: SectionKind
    rank: int
    elements: int
    basis_id: str | None
    fill: Callable[[Tensor], None]


def _parts(weights: AdapterWeights, shape: BaseShape) -> Iterator[_Part]:
    """The sections of ``weights`` in the order in which they lie and apply, its family's last.

    The first two change ``y0`` and so come before whatever is added to it.
    """
    correction = weights.correction
    if correction is not None:
        rank = max(correction.ranks.values())
        elements = core.packed_elements(shape, rank)
        yield _Part(
            "core",
            rank,
            elements,
            correction.basis_id,
            lambda out: core.pack(core.of_correction(correction), shape, out),
        )
    if weights.row_scales:
        elements = scale.packed_elements(shape)
        yield _Part("scale", 0, elements, None, partial(scale.pack, weights, shape))
    if weights.family == "core":
        elements = core.packed_elements(shape, weights.rank)
        fill = partial(core.pack, weights, shape)
        yield _Part("core", weights.rank, elements, weights.basis_id, fill)
    elif weights.family == "fold":
        rank = fold.packed_rank(weights)
        elements = fold.packed_elements(shape, rank)
        yield _Part("fold", rank, elements, None, partial(fold.pack, weights, shape))
    elif weights.family == "lora":
        elements = lora.packed_elements(shape, weights.rank)
        yield _Part("lora", weights.rank, elements, None, partial(lora.pack, weights, shape))
    else:
        elements = spectral.packed_elements(shape, weights.rank)
        fill = partial(spectral.pack, weights, shape)
        yield _Part("spectral", weights.rank, elements, weights.basis_id, fill)
