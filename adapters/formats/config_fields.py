"""Fields of ``adapter_config.json``: typed access, and what no format can serve.

Unknown fields are tolerated and missing ones take PEFT's default, because files are older and
newer than any one release. A field that changes the result in a way that is not served is refused
by name.
"""

import math
from collections.abc import Mapping
from typing import Any

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.formats.container import finite_number, printable
from shoal.adapters.formats.patterns import Pattern, parse_pattern

CONFIG_FILE = "adapter_config.json"
# PEFT's EVA writes one pattern for every module. Patterns with quantifiers cost up to a millisecond
# per module, so few are accepted.
PATTERNS_MAX = 1024
QUANTIFIED_MAX = 8

Config = Mapping[str, Any]

# Fields whose being set means the file is more than deltas on the given base.
_REFUSED_ALWAYS: Mapping[str, str] = {
    "modules_to_save": "replaced modules are not served; must be null",
    "trainable_token_indices": "replaced embedding rows are not served; must be null",
    "layer_replication": "the base's layers are not replicated; must be null",
    "target_parameters": "adapters on raw parameters are not served; must be null",
    "fan_in_fan_out": "the base stores (d_out, d_in) linears; must be false",
    "megatron_config": "is not served; must be null",
    "base_correction": "it was trained on a residual base, which is not served; must be absent",
}
_REFUSED_LORA: Mapping[str, str] = {
    "use_dora": "DoRA is not served; must be false",
    "lora_bias": "biases are not served; must be false",
    "use_qalora": "QA-LoRA is not served; must be false",
    "use_bdlora": "block-diagonal LoRA is not served; must be null",
    "alora_invocation_tokens": "activated LoRA (aLoRA) is not served; must be null",
    "kasa_config": "KaSA changes the base weights and is not served; must be null",
    "monteclora_config": "is not served; must be null",
    "velora_config": "is not served; must be null",
    "arrow_config": "routers are not served; must be null",
}
# Initialisations that leave the base as it is; the others move a part of it into the adapter.
_INIT_KEEPS_BASE = ("gaussian", "orthogonal", "eva", "mica")


def field(name: str) -> str:
    """How errors name a config field."""
    return f"{CONFIG_FILE}: {printable(name)}"


def is_set(value: object) -> bool:
    """Whether an optional field asks for something: not null, false or empty."""
    return not (value is None or value is False or value in ("", [], {}))


def get_bool(config: Config, name: str, default: bool) -> bool:
    """A boolean field."""
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise AdapterRejected(field(name), "must be true or false")
    return value


def get_rank(config: Config, name: str, default: int) -> int:
    """A positive integer field."""
    value = config.get(name, default)
    if type(value) is not int or not 1 <= value < 1 << 31:
        raise AdapterRejected(field(name), "must be a positive integer")
    return value


def get_number(config: Config, name: str, default: float) -> float:
    """A finite number."""
    number = finite_number(config.get(name, default))
    if number is None:
        raise AdapterRejected(field(name), "must be a finite number")
    return number


def check_common(config: Config) -> None:
    """Refuse what no format serves (biases, replaced modules, residual bases, …)."""
    bias = config.get("bias")
    if bias not in (None, "none"):
        raise AdapterRejected(field("bias"), "trained biases are not served; must be none")
    _refuse_set(config, _REFUSED_ALWAYS)


def check_lora(config: Config) -> None:
    """Refuse LoRA variants, and initialisations that change the base weights."""
    _refuse_set(config, _REFUSED_LORA)
    init = config.get("init_lora_weights", True)
    if init is None or isinstance(init, bool) or init in _INIT_KEEPS_BASE:
        return
    raise AdapterRejected(
        field("init_lora_weights"),
        f"{printable(str(init))} trains on changed base weights, which is not served; must be "
        f"true, false, {', '.join(_INIT_KEEPS_BASE)} (PEFT's save_pretrained(…, "
        "path_initial_model_for_weight_conversion=…) converts such an adapter)",
    )


def _refuse_set(config: Config, refused: Mapping[str, str]) -> None:
    for name, reason in refused.items():
        if is_set(config.get(name)):
            raise AdapterRejected(field(name), reason)


class LoraScaling:
    """The scale of each module, from ``r``, ``lora_alpha``, ``use_rslora`` and the patterns.

    Source: PEFT's ``LoraLayer`` scaling: ``alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA.
    """

    def __init__(self, config: Config) -> None:
        self._rank = get_rank(config, "r", 8) if "r" in config else None
        self._alpha = get_number(config, "lora_alpha", 8)
        self._rslora = get_bool(config, "use_rslora", False)
        self._ranks = _patterns(config, "rank_pattern")
        self._alphas = _patterns(config, "alpha_pattern")

    def told_rank(self, path: str) -> int:
        """The rank that the config gives a module whose tensors do not show it.

        Raises:
            AdapterRejected: overlapping rank patterns give it two, or one that is no rank.
        """
        ranks = {value for pattern, value in self._ranks if pattern.matches(path)}
        rank = ranks.pop() if ranks else float(self._rank or 8)
        if ranks or rank < 1 or rank != int(rank):
            raise AdapterRejected(
                field("rank_pattern"), f"must give {path} one positive integer: it sets its scale"
            )
        return int(rank)

    def scale(self, path: str, rank: int, tensor: str) -> float:
        """The multiplier of ``B A``.

        Args:
            path: the module's path in the model.
            rank: the rank its tensors have. It decides, because saving sorts the patterns and so
                loses the order in which training applied overlapping ones.
            tensor: the tensor to name in errors.

        Raises:
            AdapterRejected: the rank is none that the config gives this module, or overlapping
                alpha patterns give it two values.
        """
        ranks = {value for pattern, value in self._ranks if pattern.matches(path)}
        if not ranks and self._rank is not None:
            ranks = {float(self._rank)}
        if ranks and rank not in ranks:
            expected = " or ".join(f"{value:g}" for value in sorted(ranks))
            raise AdapterRejected(
                tensor, f"has rank {rank}; {CONFIG_FILE} says {expected} (r, rank_pattern)"
            )
        alphas = {value for pattern, value in self._alphas if pattern.matches(path)}
        if len(alphas) > 1:
            raise AdapterRejected(
                field("alpha_pattern"),
                f"gives {path} several values, and which one training used is not recorded",
            )
        alpha = alphas.pop() if alphas else self._alpha
        return alpha / math.sqrt(rank) if self._rslora else alpha / rank


def _patterns(config: Config, name: str) -> list[tuple[Pattern, float]]:
    given = config.get(name)
    if given is None:
        return []
    if not isinstance(given, dict) or len(given) > PATTERNS_MAX:
        raise AdapterRejected(field(name), f"must be an object of at most {PATTERNS_MAX} entries")
    parsed = []
    for key, value in given.items():
        where = field(f"{name}.{key}")
        pattern, number = parse_pattern(key), finite_number(value)
        if pattern is None:
            raise AdapterRejected(
                where, "must be a module name or a pattern of names, '.', '\\.', '\\d', '[…]', *+?"
            )
        if number is None:
            raise AdapterRejected(where, "must be a finite number")
        parsed.append((pattern, number))
    if sum(pattern.fixed is None for pattern, _ in parsed) > QUANTIFIED_MAX:
        raise AdapterRejected(field(name), f"at most {QUANTIFIED_MAX} keys may hold *, + or ?")
    return parsed
