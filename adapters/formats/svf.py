"""SVF of Transformer²: every singular value of a weight times a factor of its own.

With ``W = U diag(σ) Vᵀ`` and a vector z, ``W' = c·U diag(σ ⊙ z) Vᵀ``, ``c = Σσ / Σ(σ z)``: the
sum of the singular values stays, so a constant z changes nothing. Served as ``spectral`` with
``M = diag(σ ⊙ (c z − 1))``.

The authors publish pickles without names; this layout is ours, and `shoal adapters convert` makes
it of theirs. Per module:

- ``svf_vector (k)``, ``k = min(d_out, d_in)``, in the order of descending singular values;
- ``svd_probe (4)`` (optional with ``basis``): seeded sums of σ, see ``spectral_basis.sigma_probe``.

Config, besides ``peft_type: "SVF"`` and ``basis`` (``spectral_files.py``):

- ``vector``: ``"logits"`` (default): ``z = max_mult · sigmoid(svf_vector)``, as trained. ``"z"``:
  the vector is z. A weighted combination of experts is that: the authors' code combines their
  logits and leaves the sigmoid out.
- ``max_mult`` (default 1): only with logits. Without effect while ``renormalise`` is on.
- ``renormalise`` (default true): false leaves ``c = 1``, as in the paper's equation; the authors'
  code always renormalises.

The sigmoid of a 16-bit vector, and the product with ``max_mult``, are rounded to that type as in
the authors' code, because training saw those factors; all after it is float64. The authors' U, σ
and V are bfloat16 as well: what they compute differs from this by that rounding.
Source: SakanaAI/self-adaptive-llms (arXiv 2501.06252).
"""

import math

import torch
from torch import Tensor

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.formats.base import Format, RawAdapter, ReadContext, check_shape
from shoal.adapters.formats.config_fields import (
    Config,
    check_common,
    field,
    get_bool,
    get_number,
)
from shoal.adapters.formats.spectral_files import (
    PROBE,
    check_bytes,
    check_probe,
    diagonal,
    spectral_basis,
    spectral_weights,
)
from shoal.adapters.spec import Target
from shoal.adapters.spectral_basis import sigma_probe
from shoal.adapters.weights import AdapterWeights

VECTOR = "svf_vector"


def _read(raw: RawAdapter, context: ReadContext) -> AdapterWeights:
    check_common(raw.config)
    max_mult = _max_mult(raw.config)
    renormalise = get_bool(raw.config, "renormalise", True)
    vectors: dict[Target, tuple[str, Tensor]] = {}
    entries = 0
    for target in raw.targets:
        named = raw.part(target, VECTOR)
        components = min(context.shape.dims[target.module])
        entries += components
        check_bytes(named.name, entries, context)
        vectors[target] = (named.name, check_shape(named, components))
    basis = spectral_basis(raw, context)
    basis.prepare(vectors)
    tensors: dict[Target, tuple[Tensor, ...]] = {}
    for target, (name, vector) in vectors.items():
        sigma = basis.sigma(target)
        check_probe(raw, target, sigma_probe(sigma, target), sigma.norm().reshape(1))
        z = vector.double() if max_mult is None else (torch.sigmoid(vector) * max_mult).double()
        tensors[target] = diagonal(_values(name, sigma.double(), z, renormalise))
    return spectral_weights("svf", tensors, basis)


def _max_mult(config: Config) -> float | None:
    """What multiplies the sigmoid; None when the vectors are z already."""
    vector = config.get("vector", "logits")
    if vector not in ("logits", "z"):
        raise AdapterRejected(field("vector"), "must be logits or z")
    max_mult = get_number(config, "max_mult", 1.0)
    if vector == "z":
        if max_mult != 1:
            raise AdapterRejected(field("max_mult"), "belongs to logits; must be 1 with z")
        return None
    if max_mult <= 0:
        raise AdapterRejected(field("max_mult"), "must be positive")
    return max_mult


def _values(name: str, sigma: Tensor, z: Tensor, renormalise: bool) -> Tensor:
    """``σ ⊙ (c z − 1)``, ``(k,)`` float64."""
    total, kept = float(sigma.sum()), float((sigma * z).sum())
    if not renormalise or total == 0:  # a weight of zeros stays one
        return sigma * (z - 1)
    c = total / kept if kept != 0 else math.inf
    if not math.isfinite(c):
        raise AdapterRejected(
            name, f"Σ(σ z) is {kept:g}, by which renormalising divides; must not be zero"
        )
    return sigma * (c * z - 1)


FORMAT = Format(
    name="svf",
    markers=frozenset({VECTOR}),
    kinds=frozenset({VECTOR, PROBE}),
    peft_types=frozenset({"SVF"}),
    read=_read,
)
