"""PEFT's VeRA: ``ΔW = diag(λ_b) B diag(λ_d) A`` with random ``A`` and ``B`` that all modules share.

Per module ``vera_lambda_b (d_out)`` and ``vera_lambda_d (r)``; for all together
``base_model.vera_A (r, d_in)`` and ``base_model.vera_B (d_out, r)`` of the largest widths, of which
a module uses the leading part. No alpha: the scale is 1. Served as LoRA: ``A`` and
``diag(λ_b) B diag(λ_d)``.

Without ``vera_A`` and ``vera_B`` (``save_projection: false``) they are drawn again from
``projection_prng_key``, as PEFT does: torch's CPU generator, first ``A``, then ``B``, uniform in
``±√3·√(2 / width of the second axis)``, and rounded to the dtype of the base's weights.

Source: VeRA (arXiv 2310.11454); PEFT 0.10 to 0.21, ``tuners/vera``.
"""

import math
import re

import torch
from torch import Tensor

from shoal.adapters.errors import AdapterRejected, AdapterTooLarge
from shoal.adapters.formats.base import Format, RawAdapter, ReadContext, check_shape
from shoal.adapters.formats.config_fields import check_common, get_bool, get_rank, get_seed
from shoal.adapters.formats.keys import NamedTensor
from shoal.adapters.formats.targeting import check_complete
from shoal.adapters.spec import Dims, Target
from shoal.adapters.weights import AdapterWeights


def _read(raw: RawAdapter, context: ReadContext) -> AdapterWeights:
    check_common(raw.config)
    rank = get_rank(raw.config, "r", 256)
    dims = {target: context.shape.dims[target.module] for target in raw.targets}
    widest = Dims(max(d.d_out for d in dims.values()), max(d.d_in for d in dims.values()))
    lambdas = {}
    num_bytes = 0
    for target, own in dims.items():
        lambda_b = check_shape(raw.part(target, "vera_lambda_b"), own.d_out)
        lambda_d = check_shape(raw.part(target, "vera_lambda_d"), rank)
        lambdas[target] = (lambda_b.float(), lambda_d.float())
        # A few bytes stand for two factors as wide as the weight.
        num_bytes += 4 * rank * sum(own)
        if num_bytes > context.max_bytes:
            raise AdapterTooLarge(
                f"{target}: exceeds {context.max_bytes} bytes once expanded to factors of its own"
            )
    a, b = _projections(raw, context, rank, widest)
    tensors: dict[Target, tuple[Tensor, ...]] = {}
    for target, (lambda_b, lambda_d) in lambdas.items():
        own = dims[target]
        scaled = lambda_b[:, None] * b[: own.d_out].float() * lambda_d
        if not bool(scaled.isfinite().all()):
            raise AdapterRejected(str(target), "the product of vera_B and its lambdas overflows")
        tensors[target] = (a[:, : own.d_in].contiguous(), scaled)
    return AdapterWeights("vera", "lora", tensors, dict.fromkeys(tensors, 1.0))


def _projections(
    raw: RawAdapter, context: ReadContext, rank: int, widest: Dims
) -> tuple[Tensor, Tensor]:
    """``A (r, ≥ d_in)`` and ``B (≥ d_out, r)``: the file's, or drawn again."""
    if raw.shared or get_bool(raw.config, "save_projection", True):
        a, b = raw.shared_matrix("vera_A"), raw.shared_matrix("vera_B")
        _check_covers(a, 1, widest.d_in)
        _check_covers(b, 0, widest.d_out)
        return (
            check_shape(a, rank, a.tensor.shape[1]),
            check_shape(b, b.tensor.shape[0], rank),
        )
    check_complete(raw, context, "drawing vera_A and vera_B again")
    drawn = draw_projections(rank, widest, get_seed(raw.config, "projection_prng_key", 0))
    stored_as = context.weight_of(next(iter(raw.targets))).dtype
    return drawn[0].to(stored_as).float(), drawn[1].to(stored_as).float()


def draw_projections(rank: int, widest: Dims, seed: int) -> tuple[Tensor, Tensor]:
    """``A (rank, d_in)`` and ``B (d_out, rank)`` of the widest modules, float32 on the CPU."""
    generator = torch.Generator("cpu").manual_seed(seed)
    a = _uniform((rank, widest.d_in), generator)
    return a, _uniform((widest.d_out, rank), generator)


def _check_covers(named: NamedTensor, axis: int, least: int) -> None:
    if named.tensor.shape[axis] < least:
        raise AdapterRejected(
            named.name,
            f"shape {list(named.tensor.shape)} must be at least {least} on axis {axis}",
        )


def _uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


FORMAT = Format(
    name="vera",
    markers=frozenset({"vera_lambda_b", "vera_lambda_d"}),
    kinds=frozenset({"vera_lambda_b", "vera_lambda_d"}),
    peft_types=frozenset({"VERA"}),
    read=_read,
    shared=re.compile("vera_[AB]"),
)
