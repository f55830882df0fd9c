"""Writing VeRA in PEFT's layout; `vera.py` reads it back."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from shoal.adapters.formats.keys import SHARED_PREFIX, tensor_name
from shoal.adapters.formats.writing import ExtraConfig, expect, write_files
from shoal.adapters.spec import BaseShape, Target


def write_vera(
    directory: Path,
    lambdas: Mapping[Target, tuple[Tensor, Tensor]],
    projections: tuple[Tensor, Tensor],
    *,
    seed: int,
    d_initial: float,
    shape: BaseShape,
    extra_config: ExtraConfig = None,
) -> None:
    """Write VeRA with its projections.

    Args:
        directory: created if needed.
        lambdas: per target ``λ_b (d_out)`` and ``λ_d (r)``.
        projections: ``A (r, ≥ d_in)`` and ``B (≥ d_out, r)`` of the widest targets.
        seed: what they were drawn from.
        d_initial: where ``λ_d`` started; for tools that go on training.
        shape: the base.
        extra_config: further fields; may not replace one of ours.
    """
    a, b = projections
    tensors = {f"{SHARED_PREFIX}vera_A": a, f"{SHARED_PREFIX}vera_B": b}
    for target, (lambda_b, lambda_d) in lambdas.items():
        expect(target, lambda_b, shape.dims[target.module].d_out)
        expect(target, lambda_d, len(a))
        tensors[tensor_name(target, "vera_lambda_b")] = lambda_b
        tensors[tensor_name(target, "vera_lambda_d")] = lambda_d
    config = {
        "peft_type": "VERA",
        "r": len(a),
        "projection_prng_key": seed,
        "save_projection": True,
        "d_initial": d_initial,
    }
    write_files(directory, tensors, config, lambdas, shape, extra_config)
