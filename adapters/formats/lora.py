"""PEFT's plain LoRA and rsLoRA: ``ΔW = s B A``; on a residual base too.

Tensors ``<module>.lora_A (r, d_in)`` and ``lora_B (d_out, r)``; ``config_fields.LoraScaling`` gives
``s``. LoRA-FA, and adapters converted with ``path_initial_model_for_weight_conversion``, are this
format too. Variants that add tensors or change the base in other ways are refused by name.

PiSSA and OLoRA (``init_lora_weights``), and whatever says so in ``base_correction``, were trained
on the base less a part of it: ``corrections.py`` takes that part away again.

MiLoRA in its author's layout cannot be told from LoRA: its config has ``init_lora_weights: true``,
``lora_alpha = r`` and names the original base. It is read as LoRA unless ``base_correction`` says
``{"method": "milora"}``.

Source: PEFT 0.10 to 0.21, ``tuners/lora``.
"""

from torch import Tensor

from shoal.adapters.corrections import corrected, explicit, explicit_bytes, known_basis
from shoal.adapters.errors import AdapterRejected, AdapterTooLarge
from shoal.adapters.formats.base import (
    NO_ELEMENTS,
    Format,
    RawAdapter,
    ReadContext,
    check_scaled,
    check_shape,
)
from shoal.adapters.formats.config_fields import (
    CONFIG_FILE,
    BaseCorrection,
    LoraScaling,
    check_common,
    check_variants,
    field,
    get_bool,
    get_correction,
)
from shoal.adapters.formats.keys import module_path
from shoal.adapters.spec import Target
from shoal.adapters.weights import AdapterWeights


def _read(raw: RawAdapter, context: ReadContext) -> AdapterWeights:
    if get_bool(raw.config, "use_dora", False):
        raise AdapterRejected(
            field("use_dora"),
            "is true, but the file holds no lora_magnitude_vector. PEFT's conversion with "
            "path_initial_model_for_weight_conversion drops them, and without them the adapter "
            "is another one: save it without converting, and say base_correction instead",
        )
    weights, correction = read_factors(raw, context, "lora")
    if correction is None:
        return weights
    ranks = correction_ranks(weights, correction, context)
    check_scaled(weights)  # the last refusal, before the one side effect
    served = None
    if context.max_bases:  # else nothing is kept for others
        served = corrected(
            weights,
            correction.method,
            ranks,
            shape=context.shape,
            weight_of=context.weight_of,
            canonical=context.canonical,
            bases=context.bases,
        )
    return served or explicit_factors(weights, correction, ranks, context)


def read_factors(
    raw: RawAdapter, context: ReadContext, name: str
) -> tuple[AdapterWeights, BaseCorrection | None]:
    """``lora_A``, ``lora_B`` and ``s`` of every module, and what the base was trained without.

    Modules that the config's ``rank_pattern`` gives rank 0 are left out: they change nothing.

    Raises:
        AdapterRejected: names the tensor or field, and the rule.
    """
    check_common(raw.config, correction=True)
    check_variants(raw.config)
    correction = get_correction(raw.config)
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
        path = module_path(target)
        if not rank:
            if not scaling.may_be_zero(path):
                raise AdapterRejected(named_a.name, f"shape {list(a.shape)} {NO_ELEMENTS}")
            continue
        tensors[target] = (a, b)
        scales[target] = scaling.scale(path, rank, named_a.name)
    if not tensors:
        raise AdapterRejected("adapter_model.safetensors", "every module has rank 0")
    return AdapterWeights(name, "lora", tensors, scales), correction


def correction_ranks(
    weights: AdapterWeights, correction: BaseCorrection, context: ReadContext
) -> dict[Target, int]:
    """Columns that the correction takes on each target.

    Raises:
        AdapterRejected: more than a weight has.
    """
    ranks = {}
    for target, (a, _) in weights.tensors.items():
        rank = a.shape[0] if correction.rank is None else correction.rank
        most = min(context.shape.dims[target.module])
        if rank > most:
            raise AdapterRejected(
                str(target),
                f"{correction.method} of rank {rank} exceeds the {most} singular values of the "
                f"weight ({CONFIG_FILE}: base_correction.r, or the rank of lora_A)",
            )
        ranks[target] = rank
    return ranks


def explicit_factors(
    weights: AdapterWeights,
    correction: BaseCorrection,
    ranks: dict[Target, int],
    context: ReadContext,
) -> AdapterWeights:
    """The correction as factors of the adapter itself, within the limits of an upload.

    Raises:
        AdapterTooLarge: they exceed ``context.max_bytes``.
        AdapterRejected: they overflow float32.
    """
    size = explicit_bytes(weights, ranks)
    if size > context.max_bytes:
        raise AdapterTooLarge(
            f"with its {correction.method} correction the adapter takes {size} bytes, the limit is "
            f"{context.max_bytes}"
        )
    check_scaled(weights)
    known = known_basis(
        correction.method,
        ranks,
        shape=context.shape,
        canonical=context.canonical,
        bases=context.bases,
    )
    return explicit(weights, correction.method, ranks, context.weight_of, known)


FORMAT = Format(
    name="lora",
    markers=frozenset({"lora_A", "lora_B"}),
    kinds=frozenset({"lora_A", "lora_B"}),
    peft_types=frozenset({"LORA"}),
    read=_read,
    empty=True,
)
