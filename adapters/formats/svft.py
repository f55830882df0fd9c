"""SVFT: a sparse trained matrix between the singular vectors of a weight.

``W_eff = U (diag(s_pre) + g·M) Vᵀ`` with ``W = U diag(σ) Vᵀ``, ``g = sigmoid(gate)``. Served as
``spectral`` with ``diag(s_pre) − diag(σ) + g·M``.

What the authors save are fused models, and trainer checkpoints with u and v; this layout is ours,
and `shoal adapters convert` makes it of the latter. Per module:

- ``svft_rows (e)``, ``svft_cols (e)``, int32, and ``svft_values (e)``: the entries of M,
  0-based, in any order, duplicates summed. So every pattern (plain, banded, random, top-k) is one.
- ``svft_gate (1)`` (optional): before the sigmoid. Without it g is 1: the values are final.
- ``svft_s_pre (n)`` (optional), ``n ≤ k = min(d_out, d_in)``: the rank of training was n, which
  *discards* every component of W from n on; entries then lie within n x n. Without it, or when it
  is all of σ up to float32 rounding, W is kept whole.
- ``svd_probe (k, 4)`` (optional with ``basis``): ``basis.probe`` of U. SVFT's entries mix columns,
  so signs matter, and they are ours (``spectral_basis.py``).

Config: ``peft_type: "SVFT"``, ``basis`` (``spectral_files.py``). ``bias`` must be none.
Source: VijayLingam95/SVFT (arXiv 2405.19597).
"""

import torch
from torch import Tensor

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.families.spectral import ENTRIES_PER_COMPONENT
from shoal.adapters.formats.base import Format, RawAdapter, ReadContext, check_shape
from shoal.adapters.formats.config_fields import check_common
from shoal.adapters.formats.keys import NamedTensor
from shoal.adapters.formats.spectral_files import (
    PROBE,
    check_bytes,
    check_probe,
    spectral_basis,
    spectral_weights,
)
from shoal.adapters.spec import Target
from shoal.adapters.weights import AdapterWeights

ROWS, COLUMNS, VALUES = "svft_rows", "svft_cols", "svft_values"
GATE, S_PRE = "svft_gate", "svft_s_pre"

# Of s_pre against σ, relative to the largest: that of an SVD in float32.
KEPT_ERROR_MAX = 1e-5


def _read(raw: RawAdapter, context: ReadContext) -> AdapterWeights:
    check_common(raw.config)
    entries = 0
    for target in raw.targets:
        values = raw.part(target, VALUES)
        components = min(context.shape.dims[target.module])
        entries += values.tensor.numel() + 2 * components
        check_bytes(values.name, entries, context)
        _check_entries(raw, target, components)
    basis = spectral_basis(raw, context)
    basis.prepare(raw.targets)
    tensors: dict[Target, tuple[Tensor, ...]] = {}
    for target in raw.targets:
        expected = basis.probe(target)
        check_probe(raw, target, expected, expected.norm(dim=1, keepdim=True))
        tensors[target] = _matrix(raw, target, basis.sigma(target).double())
    return spectral_weights("svft", tensors, basis)


def _check_entries(raw: RawAdapter, target: Target, components: int) -> None:
    values = raw.part(target, VALUES)
    count = values.tensor.numel()
    check_shape(values, count)
    size = components
    s_pre = raw.targets[target].get(S_PRE)
    if s_pre is not None:
        size = s_pre.tensor.numel()
        check_shape(s_pre, size)
        if size > components:
            raise AdapterRejected(
                s_pre.name, f"has {size} values, must have at most min(d_out, d_in) = {components}"
            )
    gate = raw.targets[target].get(GATE)
    if gate is not None:
        check_shape(gate, 1)
    for kind in (ROWS, COLUMNS):
        named = raw.part(target, kind)
        index = check_shape(named, count)
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= size:
            raise AdapterRejected(
                named.name, f"holds {low if low < 0 else high}, must be within 0 and {size - 1}"
            )


def _matrix(raw: RawAdapter, target: Target, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of ``diag(s_pre) − diag(σ) + g·M``."""
    parts = raw.targets[target]
    gate, s_pre = parts.get(GATE), parts.get(S_PRE)
    factor = 1.0 if gate is None else torch.sigmoid(gate.tensor.double())
    rows, columns = (raw.part(target, kind).tensor.long() for kind in (ROWS, COLUMNS))
    values = raw.part(target, VALUES).tensor.double() * factor
    if s_pre is not None and not _is_all(s_pre.tensor, sigma):
        diagonal = -sigma
        diagonal[: len(s_pre.tensor)] += s_pre.tensor.double()
        index = torch.arange(len(sigma))
        rows, columns = torch.cat([rows, index]), torch.cat([columns, index])
        values = torch.cat([values, diagonal])
    return coalesced(rows, columns, values, len(sigma), raw.part(target, VALUES))


def _is_all(s_pre: Tensor, sigma: Tensor) -> bool:
    """Whether a file's singular values are the base's: then none is discarded."""
    if len(s_pre) != len(sigma):
        return False
    return bool((s_pre.double() - sigma).abs().max() <= KEPT_ERROR_MAX * sigma[0])


def coalesced(
    rows: Tensor, columns: Tensor, values: Tensor, components: int, named: NamedTensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of a ``k x k`` matrix sorted by (row, column), duplicates summed.

    Args:
        rows, columns, values: ``(e,)`` int64, int64, float64.
        components: k.
        named: the tensor to name in errors.

    Returns:
        int32, int32 and float32.

    Raises:
        AdapterRejected: there are more than ``ENTRIES_PER_COMPONENT`` for each component.
    """
    places, owner = torch.unique(rows * components + columns, return_inverse=True)
    most = ENTRIES_PER_COMPONENT * components
    if len(places) > most:
        raise AdapterRejected(
            named.name,
            f"stands for {len(places)} entries of M, {components} components may have {most}",
        )
    summed = torch.zeros(len(places), dtype=torch.float64).index_add_(0, owner, values)
    row, column = places // components, places % components
    return row.int(), column.int(), summed.float()


FORMAT = Format(
    name="svft",
    markers=frozenset({VALUES}),
    kinds=frozenset({ROWS, COLUMNS, VALUES, GATE, S_PRE, PROBE}),
    integers=frozenset({ROWS, COLUMNS}),
    peft_types=frozenset({"SVFT"}),
    read=_read,
)
