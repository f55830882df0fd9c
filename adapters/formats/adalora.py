"""PEFT's AdaLoRA: ``ΔW = c·B diag(E) A``, served as LoRA with ``B diag(E)``.

Per module ``lora_A (k, d_in)``, ``lora_E (k, 1)`` and ``lora_B (d_out, k)``, without ``.weight``.
``k`` is what rank allocation left of ``init_r``: from 0, a module that is not adapted, to all.
``rank_pattern`` holds the masks that the tensors were cut with; ``r`` and ``use_rslora`` mean
nothing here.

``c = lora_alpha / (init_r + 1e-5)``: PEFT loads every module with ``init_r``, whatever is left of
it. When ``lora_alpha`` is not positive, ``init_r`` takes its place, or ``k`` where there is a mask.

Source: AdaLoRA (arXiv 2303.10512); PEFT 0.10 to 0.21, ``tuners/adalora``.
"""

from torch import Tensor

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.formats.base import Format, RawAdapter, ReadContext, check_shape
from shoal.adapters.formats.config_fields import (
    CONFIG_FILE,
    Config,
    check_common,
    check_lora,
    field,
    get_number,
    get_rank,
)
from shoal.adapters.formats.keys import module_path
from shoal.adapters.spec import Target
from shoal.adapters.weights import AdapterWeights


def _read(raw: RawAdapter, context: ReadContext) -> AdapterWeights:
    check_common(raw.config)
    check_lora(raw.config)
    init_r = get_rank(raw.config, "init_r", 12)
    alpha = get_number(raw.config, "lora_alpha", 8)
    scales = {}
    tensors: dict[Target, tuple[Tensor, ...]] = {}
    for target in raw.targets:
        dims = context.shape.dims[target.module]
        named_e = raw.matrix(target, "lora_E")
        rank = named_e.tensor.shape[0]
        e = check_shape(named_e, rank, 1)
        a = check_shape(raw.part(target, "lora_A"), rank, dims.d_in)
        b = check_shape(raw.part(target, "lora_B"), dims.d_out, rank)
        if rank > init_r:
            raise AdapterRejected(
                named_e.name, f"has rank {rank}; {CONFIG_FILE} says at most {init_r} (init_r)"
            )
        kept = _kept(raw.config, target)
        if kept not in (None, rank):
            raise AdapterRejected(
                named_e.name, f"has rank {rank}; {CONFIG_FILE} says {kept} (rank_pattern)"
            )
        if rank:
            tensors[target] = (a, b.float() * e.float().T)
            numerator = alpha if alpha > 0 else init_r if kept is None else kept
            scales[target] = numerator / (init_r + 1e-5)
    if not tensors:
        raise AdapterRejected("adapter_model.safetensors", "every module has rank 0")
    for target, (_, scaled_b) in tensors.items():
        if not bool(scaled_b.isfinite().all()):
            raise AdapterRejected(str(target), "the product of lora_B and lora_E overflows")
    return AdapterWeights("adalora", "lora", tensors, scales)


def _kept(config: Config, target: Target) -> int | None:
    """What ``rank_pattern`` leaves a module: the trues of its mask; None when it does not say."""
    masks = config.get("rank_pattern")
    if masks is None:
        return None
    if not isinstance(masks, dict):
        raise AdapterRejected(field("rank_pattern"), "must be an object of masks")
    mask = masks.get(f"{module_path(target)}.lora_E")
    if not isinstance(mask, list):
        return None
    return sum(value is True for value in mask)


FORMAT = Format(
    name="adalora",
    markers=frozenset({"lora_E"}),
    kinds=frozenset({"lora_A", "lora_B", "lora_E"}),
    peft_types=frozenset({"ADALORA"}),
    read=_read,
    empty=True,
)
