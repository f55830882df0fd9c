"""What a row's adapter costs: what must be read and multiplied, whatever the kernels.

For people (``shoal adapters check``, the README's table). Nothing is scheduled by it.
"""

from collections.abc import Collection
from typing import NamedTuple

from shoal.adapters.families import core, fold, lora, scale, spectral
from shoal.adapters.families.joint_basis import CANONICAL_COLUMNS
from shoal.adapters.spec import MODULES, AdapterSpec, BaseShape, Section, Target


class Cost(NamedTuple):
    """Of one row in a decode step, all layers.

    Attributes:
        own: elements of the adapter itself that the step reads for this row.
        shared: elements that belong to the base, read once per step for all such rows.
        multiply_adds: per token.
    """

    own: int
    shared: int
    multiply_adds: int


def adapter_cost(
    spec: AdapterSpec, shape: BaseShape, targets: Collection[Target] | None = None
) -> Cost:
    """The sum over an adapter's sections; ``targets``: what it changes, by default everything."""
    each = [section_cost(section, shape, targets) for section in spec.sections]
    return Cost(*(sum(values) for values in zip(*each, strict=True)))


def section_cost(
    section: Section, shape: BaseShape, targets: Collection[Target] | None = None
) -> Cost:
    """One section. Records are dense: a target that is absent costs what one that is there does,
    but for ``spectral``, whose products are of the targets in use."""
    rank = section.rank
    if section.kind == "core":
        own = core.packed_elements(shape, rank)
        basis = shape.num_layers * rank * sum(shape.dims[module].d_out for module in MODULES)
        return Cost(own, basis, 2 * basis + own)
    if section.kind == "spectral":
        own = spectral.packed_elements(shape, rank)
        used = shape.targets() if targets is None else targets
        vectors = sum(spectral.factors_elements(shape, target) for target in used)
        return Cost(own, vectors, vectors + own // 3)
    if section.kind == "scale":
        own = scale.packed_elements(shape)
    elif section.kind == "fold":
        own = fold.packed_elements(shape, rank)
    else:
        own = lora.packed_elements(shape, rank)
    return Cost(own, 0, own)  # every element meets every token once


def launches(section: Section) -> str:
    """What a section launches on CUDA beside the base's own kernels, for all such rows together."""
    if section.kind == "core":
        # Up to that rank h comes out of the base's GEMM, and the rest rides in the kernel behind.
        wide = section.rank > CANONICAL_COLUMNS
        return "three a module" if wide else "none, where its basis has columns of the joint one"
    if section.kind == "spectral":
        return "two products as large as the base's and a sparse one a module, not in a graph"
    return "one for each fused weight" if section.kind == "scale" else "two for each fused weight"
