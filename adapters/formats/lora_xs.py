"""LoRA-XS: ``ΔW = s B R A`` with frozen ``B`` (orthonormal) and ``A = BᵀW``, in two layouts.

*Official* (the authors' code): an ordinary PEFT LoRA directory, ``lora_A (r, d_in)`` and ``lora_B
(d_out, r)``, plus ``default_lora_latent_mapping (r, r)`` in either of its two spellings; nothing in
the config says so. *Compact* (ours): ``peft_type: "LORA_XS"``, per module ``lora_latent_mapping
(r, r)`` and ``basis_probe (r, 4)``, and a field ``basis``: which basis the frozen factors are.

This file decides which basis ``R`` lives in. An official file keeps only ``R`` when its ``B`` is
that of a known basis or lies in its span; otherwise its ``B`` becomes a further basis while there
is room; otherwise, or when its factors are not what LoRA-XS defines, it is served exactly as
``lora`` with ``B`` and ``R A``.
Source: MohammadrezaBanaei/LoRA-XS (arXiv 2405.17604).
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from shoal.adapters.basis import PROBE_COLUMNS, Basis, make_basis, orthonormality_error
from shoal.adapters.basis import probes as basis_probes
from shoal.adapters.errors import AdapterRejected
from shoal.adapters.families import core
from shoal.adapters.formats.base import (
    Format,
    RawAdapter,
    ReadContext,
    check_scaled,
    check_shape,
)
from shoal.adapters.formats.config_fields import (
    LoraScaling,
    check_common,
    check_lora,
    field,
    get_bool,
    get_number,
    get_rank,
)
from shoal.adapters.formats.container import printable
from shoal.adapters.formats.keys import OFFICIAL_LATENT, NamedTensor, module_path
from shoal.adapters.spec import BaseShape, Target
from shoal.adapters.weights import AdapterWeights, WeightOf

COMPACT_LATENT = "lora_latent_mapping"
PROBE = "basis_probe"

# Allowed ‖A − BᵀW‖_F / ‖A‖_F for A to count as BᵀW. Files made in float32 have 1e-8 to 1e-6, in
# float16 3e-4 (rounding of A and B bounds it by 7e-4, reached only if every entry rounds worst).
# Look-alikes start at 1e-3 (LoRA-SB up to 0.5), and a bfloat16 file is at 2e-3: those keep their A.
FACTOR_ERROR_MAX = 5e-4
# Allowed ‖BᵀB − I‖_F: rounding to float16 gives below 2e-3 at rank 64.
ORTHONORMALITY_ERROR_MAX = 1e-2
# A file's B lies in the span of a known basis when, on every target and with Q = B_cᵀB,
# ‖QᵀQ − I‖_F and ‖B − B_c Q‖_F / √r are below these. The first is quadratic in what lies outside:
# alone it would let 0.3 % of B be lost. The second bounds the relative error of the delta by about
# itself (measured 1.2e-5 at 1e-5, 1.0e-6 at 1e-6); float32 rounding alone gives 5e-8.
SPAN_ERROR_MAX = 1e-5
OUTSIDE_MAX = 1e-6
# Allowed relative difference of each row of a probe; or what its dtype resolves, if that is more.
# A flipped or swapped column differs by about 1.
PROBE_ERROR_MAX = 1e-3


@dataclass(frozen=True, slots=True)
class Factors:
    """One target: ``ΔW = s b r a``.

    Attributes:
        a: ``(r, d_in)``.
        b: ``(d_out, r)``, float32.
        r: ``(r, r)``.
        stored: the same delta as plain LoRA's ``A`` and ``B``, for when nothing is shared: made
            only then.
    """

    a: Tensor
    b: Tensor
    r: Tensor
    stored: Callable[[], tuple[Tensor, Tensor]]


def _read(raw: RawAdapter, context: ReadContext) -> AdapterWeights:
    kinds = {kind for parts in raw.targets.values() for kind in parts}
    check_common(raw.config)
    check_lora(raw.config)
    if raw.config["peft_type"] == "LORA_XS":
        _refuse_kinds(raw, {COMPACT_LATENT, PROBE}, kinds)
        return _read_compact(raw, context)
    _refuse_kinds(raw, {OFFICIAL_LATENT, "lora_A", "lora_B"}, kinds)
    return _read_official(raw, context)


def _refuse_kinds(raw: RawAdapter, allowed: set[str], kinds: set[str]) -> None:
    if kinds <= allowed:
        return
    for parts in raw.targets.values():
        for kind, named in parts.items():
            if kind not in allowed:
                raise AdapterRejected(
                    named.name, f"does not belong to peft_type {raw.config['peft_type']}"
                )


# ------------------------------------------------------------------------------------- official


def _read_official(raw: RawAdapter, context: ReadContext) -> AdapterWeights:
    scaling = LoraScaling(raw.config)
    factors: dict[Target, Factors] = {}
    scales = {}
    for target in raw.targets:
        dims = context.shape.dims[target.module]
        named = raw.matrix(target, OFFICIAL_LATENT)
        rank = named.tensor.shape[0]
        if rank > min(dims):
            raise AdapterRejected(named.name, f"rank {rank} must be at most {min(dims)}")
        r = check_shape(named, rank, rank)
        a = check_shape(raw.part(target, "lora_A"), rank, dims.d_in)
        b = check_shape(raw.part(target, "lora_B"), dims.d_out, rank)
        factors[target] = Factors(a, b.float(), r, partial(_product, r, a, b))
        scales[target] = scaling.scale(module_path(target), rank, named.name)
    return place("lora_xs", factors, scales, context)


def place(
    name: str,
    factors: Mapping[Target, Factors],
    scales: Mapping[Target, float],
    context: ReadContext,
) -> AdapterWeights:
    """An adapter that brings its frozen factors, on a basis or, exactly, as ``lora``.

    Args:
        name: the format.
        factors: per target; all else about them has been checked.
        scales: per target.
        context: its store may get a further basis.

    Raises:
        AdapterRejected: what would be served overflows.
    """
    if not _are_lora_xs(factors, context.weight_of):
        return _explicit(name, factors, scales)
    for known in _known(context):
        placed = _place(factors, known)
        if placed is not None:
            return AdapterWeights(name, "core", placed, scales, known.id)
    own = make_basis(
        {target: each.b for target, each in factors.items()},
        kind="uploaded",
        base_digest=context.shape.digest,
    )
    kept = {target: (each.r,) for target, each in factors.items()}
    weights = AdapterWeights(name, "core", kept, scales, own.id)
    check_scaled(weights)  # the last refusal, before the one side effect
    if own.rank > core.RANK_MAX or not context.bases.add(own, limit=context.max_bases):
        return _explicit(name, factors, scales)
    return weights


def _known(context: ReadContext) -> Iterator[Basis]:
    yield context.canonical
    for basis in context.bases.all():
        # A registry may hold several bases' (A = BᵀW holds for one W only).
        if basis.id != context.canonical.id and basis.base_digest == context.shape.digest:
            yield basis


@torch.no_grad()
def _are_lora_xs(factors: Mapping[Target, Factors], weight_of: WeightOf) -> bool:
    """Whether on every target ``B`` is orthonormal and ``A`` is ``BᵀW``."""
    for target, each in factors.items():
        if not orthonormality_error(each.b) <= ORTHONORMALITY_ERROR_MAX:
            return False
        weight = weight_of(target)
        expected = (each.b.T.to(weight.device) @ weight.float()).cpu().double()
        a = each.a.double()
        if not float((a - expected).norm()) <= FACTOR_ERROR_MAX * float(a.norm()):
            return False
    return True


def _place(factors: Mapping[Target, Factors], known: Basis) -> dict[Target, tuple[Tensor]] | None:
    """Each target's ``R`` in a known basis, or None when some target's ``B`` is not in it."""
    if any(
        target not in known.factors or known.factors[target].shape[0] != each.b.shape[0]
        for target, each in factors.items()
    ):
        return None
    equal = all(
        torch.equal(known.factors[target][:, : each.b.shape[1]], each.b)
        for target, each in factors.items()
    )
    if equal:
        return {target: (each.r,) for target, each in factors.items()}
    placed: dict[Target, tuple[Tensor]] = {}
    for target, each in factors.items():
        rotation = _rotation(known.factors[target].double(), each.b.double())
        if rotation is None:
            return None
        rotated: Tensor = rotation @ each.r.double() @ rotation.T
        if not bool(torch.isfinite(rotated.float()).all()):
            return None
        placed[target] = (rotated.float(),)
    return placed


def _rotation(known: Tensor, b: Tensor) -> Tensor | None:
    """``Q = B_cᵀB`` over the fewest leading columns of ``B_c`` that span ``B``; None if none do."""
    q = known.T @ b
    identity = torch.eye(b.shape[1], dtype=b.dtype)

    def spans(leading: int) -> bool:
        part = q[:leading]
        return float((part.T @ part - identity).norm()) <= SPAN_ERROR_MAX and float(
            (b - known[:, :leading] @ part).norm()
        ) <= OUTSIDE_MAX * math.sqrt(b.shape[1])

    if known.shape[1] < b.shape[1] or not spans(known.shape[1]):
        return None
    leading = bisect_left(range(known.shape[1]), True, lo=b.shape[1], key=spans)
    return q[:leading]


def _explicit(
    name: str, factors: Mapping[Target, Factors], scales: Mapping[Target, float]
) -> AdapterWeights:
    tensors = {target: each.stored() for target, each in factors.items()}
    for target, (product, _) in tensors.items():
        if not bool(torch.isfinite(product).all()):
            raise AdapterRejected(str(target), "the product of its latent matrix and A overflows")
    return AdapterWeights(name, "lora", tensors, scales)


def _product(r: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return (r.double() @ a.double()).float(), b


# -------------------------------------------------------------------------------------- compact


def _read_compact(raw: RawAdapter, context: ReadContext) -> AdapterWeights:
    for name in ("rank_pattern", "alpha_pattern"):
        if raw.config.get(name):
            raise AdapterRejected(
                field(name), "must be absent: the compact layout has one r and one lora_alpha"
            )
    rank = get_rank(raw.config, "r", 8)
    alpha = get_number(raw.config, "lora_alpha", 8)
    # One scale for all targets, also where a small weight limits the rank.
    scale = alpha / math.sqrt(rank) if get_bool(raw.config, "use_rslora", False) else alpha / rank
    tensors: dict[Target, tuple[Tensor]] = {}
    probes: dict[Target, NamedTensor] = {}
    for target in raw.targets:
        own = min(rank, *context.shape.dims[target.module])
        tensors[target] = (check_shape(raw.part(target, COMPACT_LATENT), own, own),)
        probes[target] = raw.matrix(target, PROBE)
        check_shape(probes[target], own, PROBE_COLUMNS)
    basis = _named_basis(raw, context, probes)
    return AdapterWeights("lora_xs", "core", tensors, dict.fromkeys(tensors, scale), basis.id)


def _named_basis(
    raw: RawAdapter, context: ReadContext, probes: Mapping[Target, NamedTensor]
) -> Basis:
    """The basis a compact file was trained on: of that id, or with the same probes."""
    told = raw.config.get("basis")
    basis_id = told.get("id") if isinstance(told, dict) else None
    if not isinstance(basis_id, str):
        raise AdapterRejected(field("basis"), "must be an object with id, base_digest and rank")
    known = list(_known(context))
    named = [basis for basis in known if basis.id == basis_id]
    failures = []
    for basis in named or known:
        failure = _probe_failure(probes, basis, context.shape)
        if failure is None:
            return basis
        failures.append(failure)
    where, difference = failures[0]
    which = f"basis {named[0].id}" if named else "any known basis"
    raise AdapterRejected(
        where,
        f"does not match {which} ({difference}); the adapter was trained on basis "
        f"{printable(basis_id)}: import that one (`shoal basis import`), or upload the official "
        "layout, which carries its factors",
    )


def _probe_failure(
    probes: Mapping[Target, NamedTensor], basis: Basis, shape: BaseShape
) -> tuple[str, str] | None:
    """The first probe that differs from a basis and how, or None when the adapter is on it."""
    known = basis_probes(basis)
    expected: list[Tensor] = []
    for target, named in probes.items():
        rank = named.tensor.shape[0]
        factor = basis.factors.get(target)
        if factor is None or factor.shape[0] != shape.dims[target.module].d_out:
            return named.name, "it lacks this module"
        if factor.shape[1] < rank:
            return named.name, f"its rank is {factor.shape[1]}, the adapter's {rank}"
        expected.append(known[target][:rank])
    # All targets at once: thousands of small tensor operations would hold up running requests.
    wanted = torch.cat(expected).double()
    given = torch.cat([named.tensor.double() for named in probes.values()])
    errors = iter(((given - wanted).norm(dim=1) / wanted.norm(dim=1)).tolist())
    for named in probes.values():
        worst = max(next(errors) for _ in range(named.tensor.shape[0]))
        allowed = max(PROBE_ERROR_MAX, torch.finfo(named.tensor.dtype).eps)
        if not worst <= allowed:
            return named.name, f"relative difference {worst:.1e}, allowed {allowed:.0e}"
    return None


FORMAT = Format(
    name="lora_xs",
    markers=frozenset({OFFICIAL_LATENT, COMPACT_LATENT, PROBE}),
    kinds=frozenset({OFFICIAL_LATENT, COMPACT_LATENT, PROBE, "lora_A", "lora_B"}),
    peft_types=frozenset({"LORA", "LORA_XS"}),
    read=_read,
)
