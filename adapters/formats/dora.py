"""DoRA: ``W' = diag(g)·(W + s B A)`` with ``g = m / ‖W + s B A‖`` of each row.

LoRA's tensors and one more per module, ``lora_magnitude_vector (d_out)``, which is ``m``. The norms
need the base's weights, so ``g`` is computed here, once, in float64. (PEFT computes it in every
step, in the dtype of the weights: on a bfloat16 base its ``g`` has three digits.)

On a residual base (PiSSA, OLoRA, ``base_correction``) ``W`` is the residual: what was taken out
becomes factors of the adapter itself, because the magnitudes multiply it too.

Source: DoRA (arXiv 2402.09353); PEFT 0.10 to 0.21, ``tuners/lora/dora.py``.
"""

import torch
from torch import Tensor

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.formats.base import (
    Format,
    RawAdapter,
    ReadContext,
    check_scaled,
    check_shape,
)
from shoal.adapters.formats.config_fields import field, get_bool
from shoal.adapters.formats.keys import NamedTensor
from shoal.adapters.formats.lora import correction_ranks, explicit_factors, read_factors
from shoal.adapters.spec import Target
from shoal.adapters.weights import AdapterWeights

# Rows of the adapted weight in float64 at a time: 60 MB at d_in 14336.
_CHUNK_ROWS = 512


def _read(raw: RawAdapter, context: ReadContext) -> AdapterWeights:
    if not get_bool(raw.config, "use_dora", False):
        raise AdapterRejected(
            field("use_dora"), "must be true: the file holds lora_magnitude_vector"
        )
    weights, correction = read_factors(raw, context, "dora")
    magnitudes: dict[Target, NamedTensor] = {}
    for target in raw.targets:
        named = raw.part(target, "lora_magnitude_vector")
        check_shape(named, context.shape.dims[target.module].d_out)
        if target not in weights.tensors:
            raise AdapterRejected(named.name, "belongs to a module of rank 0")
        magnitudes[target] = named
    check_scaled(weights)
    if correction is not None:
        ranks = correction_ranks(weights, correction, context)
        weights = explicit_factors(weights, correction, ranks, context)
    row_scales = {}
    for target, named in magnitudes.items():
        a, b = weights.tensors[target]
        norms = row_norms(context.weight_of(target), a, b, weights.scales[target])
        row_scales[target] = _ratio(named, norms)
    return AdapterWeights("dora", "lora", weights.tensors, weights.scales, row_scales=row_scales)


@torch.no_grad()
def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``‖(W + s B A)_o‖`` of every row ``o``, ``(d_out)`` float64 on the CPU.

    From the rows themselves, some at a time: expanding the square costs as much and cancels.
    """
    device = weight.device
    wide_a = a.to(device, torch.float64)
    wide_b = b.to(device, torch.float64) * scale
    norms = [
        torch.addmm(rows.to(torch.float64), own, wide_a).norm(dim=1)
        for rows, own in zip(
            torch.split(weight, _CHUNK_ROWS), torch.split(wide_b, _CHUNK_ROWS), strict=True
        )
    ]
    return torch.cat(norms).cpu()


def _ratio(named: NamedTensor, norms: Tensor) -> Tensor:
    zero = (norms == 0).nonzero()
    if len(zero):
        raise AdapterRejected(
            named.name, f"scales row {int(zero[0])} of the adapted weight, whose norm is zero"
        )
    g = (named.tensor.double() / norms).float()
    if not bool(torch.isfinite(g).all()):
        raise AdapterRejected(
            named.name, "divided by the row norms of the adapted weight it is not finite"
        )
    return g


FORMAT = Format(
    name="dora",
    markers=frozenset({"lora_magnitude_vector"}),
    kinds=frozenset({"lora_A", "lora_B", "lora_magnitude_vector"}),
    peft_types=frozenset({"LORA"}),
    read=_read,
)
