"""The weighted sum of adapters as one adapter of the bank.

Every family adds a fixed ``ΔW`` to its base, so every sum is one too, and what is exact alone is
exact in a sum. What can share a section does:

======================  ===========================================================================
``core``, corrections   on one basis: ``R`` adds up, at the largest rank
``fold``                ``D`` adds up, at the least common multiple of the ranks
``lora``                factors side by side, so ranks add up
row scales (DoRA)       ``g - 1`` adds up
``spectral``            entries add up, place by place
======================  ===========================================================================

Sections of different kinds lie behind one another. What a record has no room for becomes ``lora``:
``core`` on further bases (a step reads one basis for a row), all ``core`` beside row scales (each
would see what the other did to ``y0``), and ``fold`` where the common multiple costs more than its
factors. Sums are float64 and rounded once, to the bank's dtype.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from shoal.adapters.basis import Basis
from shoal.adapters.errors import AdapterRejected, BlendRefused
from shoal.adapters.families import core, fold, lora, spectral
from shoal.adapters.packing import PackedAdapter, make_sum_spec, pack_sum
from shoal.adapters.spec import AdapterSpec, BaseShape, Target
from shoal.adapters.weights import AdapterWeights, Term, Terms, WeightOf

# Of the factors together: a step keeps that many numbers for each token and module.
RANK_MAX = 1024


@dataclass(frozen=True, slots=True)
class Base:
    """What a sum is composed on.

    Attributes:
        shape, weight_of: the base.
        basis_of: a basis by its id; raises if it cannot be had.
    """

    shape: BaseShape
    weight_of: WeightOf
    basis_of: Callable[[str], Basis]


@torch.no_grad()
def compose(
    terms: Terms,
    names: Sequence[str],
    digest: str,
    base: Base,
    *,
    dtype: torch.dtype,
    max_bytes: int,
) -> PackedAdapter:
    """Make the sum; what it takes is known, and refused, before anything large is allocated.

    Args:
        terms: at least one. Their singular vectors, if any, are the base's.
        names: of the terms, for errors.
        digest: of the sum.
        dtype: of the bank.
        max_bytes: of the packed sum.

    Raises:
        BlendRefused: too large, of too high a rank, or a value is beyond what ``dtype`` holds.
        Whatever ``basis_of`` raises.
    """
    plan = _plan(terms, base.shape)
    try:
        spec = make_sum_spec(plan.outline(base.shape), base.shape, digest)
        largest = max(
            zip(terms, names, strict=True),
            key=lambda each: make_sum_spec([each[0]], base.shape, "").packed_elements,
        )[1]
        _check(spec, plan, base.shape, largest, max_bytes // dtype.itemsize)
        return pack_sum(plan.made(base), base.shape, digest, dtype)
    except AdapterRejected as error:
        raise BlendRefused(f"the adapters {', '.join(names)} cannot be blended: {error}") from error


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is summed as it is, and what becomes ``lora`` before.

    Attributes:
        kept: may share a record.
        cores: on one basis each.
        folds: of any ranks.
    """

    kept: list[Term]
    cores: list[list[Term]]
    folds: list[Term]

    def outline(self, shape: BaseShape) -> list[Term]:
        """The sum's terms by their shapes, without the values of what becomes ``lora``."""
        turned = [_outline(_ranks(group), shape) for group in self.cores]
        turned += [_outline(_ranks([term]), shape) for term in self.folds]
        return [*self.kept, *(Term(weights) for weights in turned)]

    def made(self, base: Base) -> list[Term]:
        """The sum's terms."""
        turned = [Term(_core_as_lora(group, base)) for group in self.cores]
        turned += [Term(_fold_as_lora(weights, base.shape), f) for weights, f in self.folds]
        return [*self.kept, *turned]


def _plan(terms: Terms, shape: BaseShape) -> _Plan:
    kept: list[Term] = []
    folds: list[Term] = []
    cores: dict[str, list[Term]] = {}
    for weights, factor in terms:
        if weights.correction is not None:
            turned = core.of_correction(weights.correction)
            cores.setdefault(weights.correction.basis_id, []).append(Term(turned, factor))
            weights = replace(weights, correction=None)
        if weights.family == "core":
            assert weights.basis_id is not None
            cores.setdefault(weights.basis_id, []).append(Term(weights, factor))
        elif weights.family == "fold":
            folds.append(Term(weights, factor))
        else:
            kept.append(Term(weights, factor))
    if cores and not any(weights.row_scales for weights, _ in kept):
        # What stays costs r² instead of r times the widths: the largest, whatever their order.
        basis_id = max(sorted(cores), key=lambda each: max(t.weights.rank for t in cores[each]))
        kept += cores.pop(basis_id)
    if _may_share(folds, shape):
        kept += folds
        folds = []
    return _Plan(kept, [cores[basis_id] for basis_id in sorted(cores)], folds)


def _may_share(folds: Terms, shape: BaseShape) -> bool:
    """Whether folds are summed at their common rank rather than as factors."""
    if len(folds) < 2:
        return True
    try:
        rank = fold.packed_rank(folds)
    except AdapterRejected:
        return False
    apart = sum(weights.rank for weights, _ in folds)
    return fold.packed_elements(shape, rank) <= lora.packed_elements(shape, apart)


def _check(
    spec: AdapterSpec, plan: _Plan, shape: BaseShape, largest: str, max_elements: int
) -> None:
    """Raise BlendRefused when the sum is beyond what may run."""
    for section in spec.sections:
        if section.kind == "lora" and section.rank > RANK_MAX:
            raise BlendRefused(
                f"the blend's factors have rank {section.rank} together, at most {RANK_MAX} can "
                f"be served; leave out some, {largest!r} is the largest"
            )
    spectrals = [term for term in plan.kept if term.weights.family == "spectral"]
    if len(spectrals) > 1:
        for target, (rows, _, _) in spectral.summed(spectrals).items():
            most = spectral.ENTRIES_PER_COMPONENT * min(shape.dims[target.module])
            if len(rows) > most:
                raise BlendRefused(
                    f"the blend changes {len(rows)} places between singular vectors of {target}, "
                    f"at most {most} can be served; leave out some, {largest!r} is the largest"
                )
    if spec.packed_elements > max_elements:
        kinds = ", ".join(f"{s.kind} of rank {s.rank}" for s in spec.sections)
        raise BlendRefused(
            f"the blend takes {spec.packed_elements} numbers in memory ({kinds}), this server has "
            f"room for {max_elements}; leave out some, {largest!r} is the largest"
        )


def _ranks(terms: Terms) -> dict[Target, int]:
    ranks: dict[Target, int] = {}
    for weights, _ in terms:
        for target, parts in weights.tensors.items():
            ranks[target] = max(ranks.get(target, 0), parts[0].shape[0])
    return ranks


def _outline(ranks: Mapping[Target, int], shape: BaseShape) -> AdapterWeights:
    """``lora`` weights of these ranks that take no memory."""
    tensors: dict[Target, tuple[torch.Tensor, ...]] = {}
    for target, rank in ranks.items():
        dims = shape.dims[target.module]
        sizes = ((rank, dims.d_in), (dims.d_out, rank))
        tensors[target] = tuple(torch.empty(size, device="meta") for size in sizes)
    return AdapterWeights("blend", "lora", tensors, dict.fromkeys(tensors, 1.0))


def _core_as_lora(terms: Terms, base: Base) -> AdapterWeights:
    """A sum on one basis, its weights included."""
    basis_id = terms[0].weights.basis_id
    assert basis_id is not None
    basis = base.basis_of(basis_id)
    tensors: dict[Target, tuple[torch.Tensor, ...]] = {
        target: core.factors(r_matrix, basis.factors[target], base.weight_of(target))
        for target, r_matrix in core.summed(terms).items()
    }
    return AdapterWeights("blend", "lora", tensors, dict.fromkeys(tensors, 1.0))


def _fold_as_lora(weights: AdapterWeights, shape: BaseShape) -> AdapterWeights:
    tensors: dict[Target, tuple[torch.Tensor, ...]] = {
        target: fold.factors(d_matrix, shape.dims[target.module].d_in)
        for target, (d_matrix,) in weights.tensors.items()
    }
    return AdapterWeights("blend", "lora", tensors, weights.scales)
