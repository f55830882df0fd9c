"""Names of adapter tensors: which target of the base they belong to, and what they are there.

Grammar: ``base_model.model.<module path>.<kind>[.weight]``, and ``base_model.<kind>[.weight]`` for
what the modules of some formats share. The trailing ``.weight`` is optional,
because which tensors carry it depends on the PEFT release that wrote the file. A name that fits no
adaptable module of the base is refused here with the reason; nothing is dropped.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.formats.container import printable
from shoal.adapters.spec import MODULES, BaseShape, Target

PREFIX = "base_model.model."
SHARED_PREFIX = "base_model."

# The authors' LoRA-XS module is named `default_lora_latent_mapping`. PEFT below 0.18 removes
# `.default` anywhere in a key when it saves, and so cuts into that name; PEFT from 0.18 does not.
OFFICIAL_LATENT = "default_lora_latent_mapping"
_OFFICIAL_LATENT = re.compile(r"(.+?)(?:\.default)?_lora_latent_mapping", re.DOTALL)
_LATENT_END = "_lora_latent_mapping"

_BLOCKS = {
    module: "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    for module in MODULES
}
_MODULE_PATH = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})\.(self_attn|mlp)\.([a-z_]+)")

# Tensors that are known and cannot be served, by a pattern in their name: first match counts.
_REASONS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r"lora_magnitude_vector", "DoRA magnitudes are served beside lora_A and lora_B alone"),
        (r"\.lora_E$", "AdaLoRA's lora_E is served beside lora_A and lora_B alone"),
        (r"\.lora_diag$", "KaSA is not served: it removes singular components of the base"),
        (r"lora_velora_embed|lora_monteclora", "this LoRA variant is not served"),
        (r"lora_embedding_[AB]$", "adapted embeddings are not served"),
        (r"token_adapter", "replaced embedding rows (trainable tokens) are not served"),
        (
            r"lora_[AB]_vec|lora_A_anti_vec|lora_pair_mask|lora_[AB]_shared",
            "is of a PRoLoRA or MoS checkpoint with factors still shared, and no file says how; "
            "the adapter_model.bin that their trainers save at the end holds plain LoRA: use that",
        ),
        (r"\.bias$", "biases are not served: they replace or extend those of the shared base"),
        (r"(embed_tokens|lm_head)", "embeddings and the output head are not adaptable"),
        (r"base_layer", "replaced base weights are not served"),
        (r"norm", "normalisation weights are not adaptable"),
        (r"psoft_|ia3_|oft_|hra_|randlora_", "is not served"),
    )
)


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """A tensor with the name it has in the file, for error messages."""

    name: str
    tensor: Tensor


def module_path(target: Target) -> str:
    """The Hugging Face path of a target, ``model.layers.N.self_attn.q_proj``."""
    return f"model.layers.{target.layer}.{_BLOCKS[target.module]}.{target.module}"


def tensor_name(target: Target, kind: str) -> str:
    """The full key of a target's tensor, without ``.weight``."""
    return f"{PREFIX}{module_path(target)}.{kind}"


def split_name(name: str) -> tuple[str, str]:
    """Split a key into the module path and the tensor's kind, whatever both are."""
    name = name.removesuffix(".weight")
    official = _OFFICIAL_LATENT.fullmatch(name) if name.endswith(_LATENT_END) else None
    if official is not None:
        return official[1].removeprefix(PREFIX), OFFICIAL_LATENT
    path, _, kind = name.rpartition(".")
    return path.removeprefix(PREFIX), kind


def split_shared(
    tensors: Mapping[str, Tensor], shared: re.Pattern[str] | None
) -> tuple[dict[str, NamedTensor], dict[str, Tensor]]:
    """Take out what belongs to no module: ``base_model.<kind>`` where the pattern fits the kind.

    Returns:
        Those by kind, and the other tensors.

    Raises:
        AdapterRejected: one given under two spellings; names the tensor.
    """
    taken: dict[str, NamedTensor] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        kind = name.removesuffix(".weight").removeprefix(SHARED_PREFIX)
        if shared is None or not name.startswith(SHARED_PREFIX) or not shared.fullmatch(kind):
            rest[name] = tensor
        elif kind in taken:
            raise AdapterRejected(
                printable(name), f"the same tensor is also given as {taken[kind].name}"
            )
        else:
            taken[kind] = NamedTensor(name, tensor)
    return taken, rest


def group_by_target(
    tensors: Mapping[str, Tensor], kinds: Iterable[str], format_name: str, shape: BaseShape
) -> dict[Target, dict[str, NamedTensor]]:
    """Sort a file's tensors by target and kind.

    Args:
        tensors: every tensor of the file.
        kinds: what a file of this format may hold.
        format_name: for messages.
        shape: the base.

    Returns:
        Layer by layer, modules in ``MODULES`` order.

    Raises:
        AdapterRejected: a tensor of another kind, of a module that the base does not have or that
            cannot be adapted, or one given under two spellings. Names the tensor.
    """
    allowed = frozenset(kinds)
    found: dict[Target, dict[str, NamedTensor]] = {}
    for name, tensor in tensors.items():
        path, kind = split_name(name)
        if kind not in allowed:
            raise AdapterRejected(
                printable(name),
                refusal(name)
                or f"is not a tensor of a {format_name} adapter, "
                f"which holds {', '.join(sorted(allowed))} per module",
            )
        target = _target(name, path, shape)
        parts = found.setdefault(target, {})
        if kind in parts:
            raise AdapterRejected(
                printable(name), f"the same tensor is also given as {parts[kind].name}"
            )
        parts[kind] = NamedTensor(name, tensor)
    return {target: found[target] for target in sorted(found, key=_position)}


def refusal(name: str) -> str | None:
    """Why a known but unserved tensor is refused, or None for an unknown one."""
    name = name.removesuffix(".weight")
    return next((reason for pattern, reason in _REASONS if pattern.search(name)), None)


def _target(name: str, path: str, shape: BaseShape) -> Target:
    match = _MODULE_PATH.fullmatch(path)
    if match is None or not name.startswith(PREFIX) or _BLOCKS.get(match[3]) != match[2]:
        example = tensor_name(Target(0, "q_proj"), "…")
        raise AdapterRejected(
            printable(name),
            refusal(name) or f"must belong to one of {', '.join(MODULES)}, in the form {example}",
        )
    layer = int(match[1])
    if layer >= shape.num_layers:
        raise AdapterRejected(
            printable(name), f"the base {shape.name} has layers 0 to {shape.num_layers - 1}"
        )
    return Target(layer, match[3])


def _position(target: Target) -> tuple[int, int]:
    return target.layer, MODULES.index(target.module)
