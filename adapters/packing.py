"""From validated weights to the one contiguous record that the device bank takes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.families import core, fold, lora, scale, spectral
from shoal.adapters.spec import UNIT_ELEMENTS, AdapterSpec, BaseShape, Family, Section, SectionKind
from shoal.adapters.weights import AdapterWeights, Correction, Term, Terms


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
    return make_sum_spec([Term(weights)], shape, digest)


def make_sum_spec(terms: Terms, shape: BaseShape, digest: str) -> AdapterSpec:
    """As ``make_spec`` of a weighted sum: a section for each kind that a term has.

    Args:
        terms: at least one. Their ``core`` matrices and corrections are on one basis, and there
            are none where a term has row scales (whichever came first, the other would see what it
            did): ``composing.py`` sees to that.
    """
    *before, own = _parts(terms, shape)
    extra: list[Section] = []
    unit = 0
    for part in before:
        extra.append(Section(part.kind, part.rank, unit, part.basis_id))
        unit += -(-part.elements // UNIT_ELEMENTS)
    return AdapterSpec(
        digest=digest,
        family=cast(Family, own.kind),  # row scales have a lora part behind them
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
    return pack_sum([Term(weights)], shape, digest, dtype)


def pack_sum(terms: Terms, shape: BaseShape, digest: str, dtype: torch.dtype) -> PackedAdapter:
    """As ``pack_adapter`` of a weighted sum, see ``make_sum_spec``. Sums are float64."""
    spec = make_sum_spec(terms, shape, digest)
    data = torch.zeros(spec.packed_elements, dtype=dtype)
    for section, part in zip(spec.sections, _parts(terms, shape), strict=True):
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


def _parts(terms: Terms, shape: BaseShape) -> Iterator[_Part]:
    """The sections of a sum in the order in which they lie and apply.

    The first two change ``y0`` and so come before whatever is added to it.
    """
    by_family: dict[Family, list[Term]] = {}
    for term in terms:
        by_family.setdefault(term.weights.family, []).append(term)
    corrected = [term for term in terms if term.weights.correction is not None]
    yield from _core_part(by_family.get("core", []), corrected, shape)
    scaled = [term for term in terms if term.weights.row_scales]
    if scaled:
        elements = scale.packed_elements(shape)
        yield _Part("scale", 0, elements, None, partial(scale.pack, scaled, shape))
    folds = by_family.get("fold")
    if folds:
        rank = fold.packed_rank(folds)
        elements = fold.packed_elements(shape, rank)
        yield _Part("fold", rank, elements, None, partial(fold.pack, folds, shape))
    loras = by_family.get("lora")
    if loras:
        rank = lora.packed_rank(loras)
        elements = lora.packed_elements(shape, rank)
        yield _Part("lora", rank, elements, None, partial(lora.pack, loras, shape))
    spectrals = by_family.get("spectral")
    if spectrals:
        rank = spectral.packed_rank(spectrals)
        elements = spectral.packed_elements(shape, rank)
        basis_id = spectrals[0].weights.basis_id
        yield _Part("spectral", rank, elements, basis_id, partial(spectral.pack, spectrals, shape))


def _core_part(cores: Terms, corrected: Terms, shape: BaseShape) -> Iterator[_Part]:
    """``core`` terms, and what corrections take away, as one section."""
    corrections: list[tuple[Correction, float]] = [
        (weights.correction, factor)
        for weights, factor in corrected
        if weights.correction is not None
    ]
    if not cores and not corrections:
        return
    ranks = [weights.rank for weights, _ in cores]
    ranks += [max(correction.ranks.values()) for correction, _ in corrections]
    basis_ids = {weights.basis_id for weights, _ in cores}
    basis_ids |= {correction.basis_id for correction, _ in corrections}
    (basis_id,) = basis_ids
    elements = core.packed_elements(shape, max(ranks))

    def fill(out: Tensor) -> None:
        turned = [Term(core.of_correction(each), factor) for each, factor in corrections]
        core.pack([*cores, *turned], shape, out)

    yield _Part("core", max(ranks), elements, basis_id, fill)
