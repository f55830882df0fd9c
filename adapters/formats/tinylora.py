"""PEFT's TinyLoRA: LoRA-XS whose ``R`` is a sum of fixed random matrices, ``R = Σ_i v_i P_i``.

Per module ``tinylora_A (r, d_in) = √Σ Vᵀ`` and ``tinylora_B (d_out, r) = U √Σ`` of the weight's
SVD, and ``tinylora_P (u, r, r)``; for a group of modules ``base_model.tinylora_v.<group> (u)``, all
that is trained. ``ΔW = B R A``, scale 1. With ``σ = ‖B_i‖²`` of the columns this is LoRA-XS with
``U``, ``ΣVᵀ`` and ``R' = √Σ R √Σ⁻¹``, and shares a basis like LoRA-XS; if not, it is served as LoRA
with ``R A`` and ``B``.

Modules are numbered in the model's order, from 0 to n-1, over all that the config targets. There
are ``G = max(1, round(n (1 - weight_tying)))`` groups of ``max(1, n // G)`` modules, the last one
with the rest. Without ``tinylora_P`` (``save_projection: false``) module ``i`` draws it again as
PEFT does: torch's CPU generator with seed ``projection_seed + i``, normal with deviation ``1/√r``,
rounded to the dtype of the base's weights.

Source: TinyLoRA (arXiv 2602.04118); PEFT 0.21, ``tuners/tinylora``.
"""

import re
from functools import partial

import torch
from torch import Tensor

from shoal.adapters.errors import AdapterRejected, AdapterTooLarge
from shoal.adapters.formats.base import Format, RawAdapter, ReadContext, check_shape
from shoal.adapters.formats.config_fields import (
    CONFIG_FILE,
    check_common,
    field,
    get_number,
    get_rank,
    get_seed,
)
from shoal.adapters.formats.keys import SHARED_PREFIX, NamedTensor
from shoal.adapters.formats.lora_xs import Factors, place
from shoal.adapters.formats.targeting import check_complete
from shoal.adapters.spec import Target
from shoal.adapters.weights import AdapterWeights

_V = "tinylora_v."


def _read(raw: RawAdapter, context: ReadContext) -> AdapterWeights:
    check_common(raw.config)
    rank = get_rank(raw.config, "r", 2)
    count = get_rank(raw.config, "u", 64)
    seed = get_seed(raw.config, "projection_seed", 42)
    check_complete(raw, context, "numbering the modules")
    vectors = _vectors(raw, count)
    saved = any("tinylora_P" in parts for parts in raw.targets.values())
    if not saved and 4 * count * rank * rank > context.max_bytes:
        raise AdapterTooLarge(f"{field('u')}: {count} matrices exceed {context.max_bytes} bytes")
    factors: dict[Target, Factors] = {}
    for i, target in enumerate(raw.targets):
        dims = context.shape.dims[target.module]
        own = min(rank, *dims)
        a = check_shape(raw.part(target, "tinylora_A"), own, dims.d_in)
        b = check_shape(raw.part(target, "tinylora_B"), dims.d_out, own)
        if saved:
            p = check_shape(raw.part(target, "tinylora_P"), count, own, own)
        else:
            p = _drawn(count, own, seed + i).to(context.weight_of(target).dtype)
        r = torch.einsum("i,ijk->jk", vectors[i].double(), p.double())
        factors[target] = _as_lora_xs(a, b, r)
    return place("tinylora", factors, dict.fromkeys(factors, 1.0), context)


def _vectors(raw: RawAdapter, count: int) -> list[Tensor]:
    """``v`` of each module, in their order."""
    tying = get_number(raw.config, "weight_tying", 0.0)
    if not 0 <= tying <= 1:
        raise AdapterRejected(field("weight_tying"), "must be from 0 to 1")
    modules = len(raw.targets)
    groups = max(1, round(modules * (1.0 - tying)))
    for kind, named in raw.shared.items():
        if int(kind.removeprefix(_V)) >= groups:
            raise AdapterRejected(
                named.name,
                f"{modules} modules make {groups} groups ({CONFIG_FILE}: weight_tying {tying:g})",
            )
    found = [_vector(raw, group, count) for group in range(groups)]
    size = max(1, modules // groups)
    return [found[min(i // size, groups - 1)] for i in range(modules)]


def _vector(raw: RawAdapter, group: int, count: int) -> Tensor:
    named: NamedTensor | None = raw.shared.get(f"{_V}{group}")
    if named is None:
        raise AdapterRejected(f"{SHARED_PREFIX}{_V}{group}", "is missing")
    return check_shape(named, count)


def _drawn(count: int, rank: int, seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.normal(0.0, 1.0 / rank**0.5, (count, rank, rank), generator=generator)


def _as_lora_xs(a: Tensor, b: Tensor, r: Tensor) -> Factors:
    # Where a singular value is zero the quotients are not finite: then it is no LoRA-XS.
    roots = b.double().norm(dim=0)
    return Factors(
        a=roots[:, None] * a.double(),
        b=(b.double() / roots).float(),
        r=(roots[:, None] * r / roots).float(),
        stored=partial(_product, r, a, b),
    )


def _product(r: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return (r @ a.double()).float(), b


FORMAT = Format(
    name="tinylora",
    markers=frozenset({"tinylora_A", "tinylora_B", "tinylora_P"}),
    kinds=frozenset({"tinylora_A", "tinylora_B", "tinylora_P"}),
    peft_types=frozenset({"TINYLORA"}),
    read=_read,
    shared=re.compile(r"tinylora_v\.(0|[1-9][0-9]{0,6})"),
)
