"""Writes the trained adapter into its run directory, in the layout that the options ask for.

The layouts themselves belong to ``formats/writing.py``.
"""

from pathlib import Path

from shoal.adapters.basis import Basis
from shoal.adapters.formats.writing import (
    write_compact_lora_xs,
    write_lora,
    write_miss,
    write_official_lora_xs,
)
from shoal.adapters.spec import BaseShape
from shoal.adapters.training.config import TrainConfig
from shoal.adapters.weights import AdapterWeights, WeightOf


def write_adapter(
    directory: Path,
    config: TrainConfig,
    weights: AdapterWeights,
    *,
    shape: BaseShape,
    basis: Basis | None,
    weight_of: WeightOf,
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        directory: where to; files of those names are replaced atomically.
        config: decides the format; its scale is stored as alpha.
        weights: what was trained.
        shape: the base.
        basis: what a LoRA-XS adapter was trained on; None for the others.
        weight_of: the base's weights; the official LoRA-XS layout contains ``BᵀW``.
    """
    # We always train on the base as it is, and say so: other tools train on what is left of it
    # after the adapter's initial value was taken away (PiSSA, MiLoRA).
    extra = {"base_correction": None}
    alpha = config.scale * config.rank
    if weights.family == "fold":
        blocks = {target: parts[0] for target, parts in weights.tensors.items()}
        write_miss(directory, blocks, rank=config.rank, shape=shape, extra_config=extra)
        return
    if weights.family == "lora":
        pairs = {target: (parts[0], parts[1]) for target, parts in weights.tensors.items()}
        write_lora(directory, pairs, alpha=alpha, rank=config.rank, shape=shape, extra_config=extra)
        return
    assert basis is not None
    cores = {target: parts[0] for target, parts in weights.tensors.items()}
    if config.format == "official":
        write_official_lora_xs(
            directory,
            cores,
            alpha=alpha,
            rank=config.rank,
            basis=basis,
            shape=shape,
            weight_of=weight_of,
            extra_config=extra,
        )
    else:
        write_compact_lora_xs(
            directory,
            cores,
            alpha=alpha,
            rank=config.rank,
            basis=basis,
            shape=shape,
            extra_config=extra,
        )
