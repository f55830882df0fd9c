"""PEFT's plain LoRA and rsLoRA: ``ΔW = s B A``.

Tensors ``<module>.lora_A (r, d_in)`` and ``lora_B (d_out, r)``; ``config_fields.LoraScaling`` gives
``s``. LoRA-FA, and adapters converted with ``path_initial_model_for_weight_conversion``, are this
format too. Variants that add tensors or change the base are refused by name.
Source: PEFT 0.10 to 0.21, ``tuners/lora``.
"""

from torch import Tensor

from shoal.adapters.formats.base import Format, RawAdapter, ReadContext, check_shape
from shoal.adapters.formats.config_fields import LoraScaling, check_common, check_lora
from shoal.adapters.formats.keys import module_path
from shoal.adapters.spec import Target
from shoal.adapters.weights import AdapterWeights


def _read(raw: RawAdapter, context: ReadContext) -> AdapterWeights:
    check_common(raw.config)
    check_lora(raw.config)
    scaling = LoraScaling(raw.config)
    tensors: dict[Target, tuple[Tensor, ...]] = {}
    scales = {}
    for target in raw.targets:
        dims = context.shape.dims[target.module]
        named_a = raw.matrix(target, "lora_A")
        named_b = raw.part(target, "lora_B")
        rank = named_a.tensor.shape[0]
        a = check_shape(named_a, rank, dims.d_in)
        b = check_shape(named_b, dims.d_out, rank)
        tensors[target] = (a, b)
        scales[target] = scaling.scale(module_path(target), rank, named_a.name)
    return AdapterWeights("lora", "lora", tensors, scales)


FORMAT = Format(
    name="lora",
    markers=frozenset({"lora_A", "lora_B"}),
    kinds=frozenset({"lora_A", "lora_B"}),
    peft_types=frozenset({"LORA"}),
    read=_read,
)
