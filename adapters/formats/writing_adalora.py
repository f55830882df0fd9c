"""Writing AdaLoRA in PEFT's layout; `adalora.py` reads it back."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from shoal.adapters.formats.keys import module_path, tensor_name
from shoal.adapters.formats.writing import ExtraConfig, expect, write_files
from shoal.adapters.spec import BaseShape, Target


class Triplets(NamedTuple):
    """One target: ``B diag(E) A``, and which of its columns, values and rows are left.

    Attributes:
        a: ``(k, d_in)``.
        e: ``(k,)``.
        b: ``(d_out, k)``.
        kept: ``(k,)`` bool.
    """

    a: Tensor
    e: Tensor
    b: Tensor
    kept: Tensor


def write_adalora(
    directory: Path,
    triplets: Mapping[Target, Triplets],
    *,
    alpha: float,
    shape: BaseShape,
    extra_config: ExtraConfig,
) -> None:
    """Write AdaLoRA; what is not kept is left out, and ``rank_pattern`` says where.

    Args:
        directory: created if needed.
        triplets: per target, all with the same ``k``.
        alpha: the scale is ``alpha / (init_r + 1e-5)``.
        shape: the base.
        extra_config: must hold ``init_r``, which is ``k``, and ``total_step``: PEFT reads no file
            without it.
    """
    tensors: dict[str, Tensor] = {}
    pattern: dict[str, list[bool]] = {}
    for target, (a, e, b, kept) in triplets.items():
        dims = shape.dims[target.module]
        expect(target, a, len(kept), dims.d_in)
        expect(target, e, len(kept))
        expect(target, b, dims.d_out, len(kept))
        tensors[tensor_name(target, "lora_A")] = a[kept]
        tensors[tensor_name(target, "lora_E")] = e[kept][:, None]
        tensors[tensor_name(target, "lora_B")] = b[:, kept].contiguous()
        pattern[f"{module_path(target)}.lora_E"] = kept.tolist()
    config = {"peft_type": "ADALORA", "lora_alpha": alpha, "rank_pattern": pattern}
    write_files(directory, tensors, config, triplets, shape, extra_config)
