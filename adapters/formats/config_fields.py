"""Fields of ``adapter_config.json``: typed access, and what no format can serve.

Unknown fields are tolerated and missing ones take PEFT's default, because files are older and
newer than any one release. A field that changes the result in a way that is not served is refused
by name.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from shoal.adapters.errors import AdapterRejected
from shoal.adapters.formats.container import finite_number, printable
from shoal.adapters.formats.patterns import Pattern, parse_pattern
from shoal.adapters.weights import CORRECTION_METHODS, CorrectionMethod

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
}
_REFUSED_LORA: Mapping[str, str] = {
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
# What moved can be found again from the base alone. Of the others it depends on a random state
# (pissa_niter_*), on data (corda, lora_ga) or on a quantiser (loftq).
_INIT_EXACT: Mapping[str, CorrectionMethod] = {"pissa": "pissa", "olora": "olora"}
_CONVERT = (
    "PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=<the adapter as it was "
    "initialised>) converts it to plain LoRA; an adapter for a base that is itself the residual "
    "says true"
)


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


def get_seed(config: Config, name: str, default: int) -> int:
    """What a random generator starts from."""
    value = config.get(name, default)
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise AdapterRejected(field(name), "must be an integer from 0 to below 2^62")
    return value


def get_number(config: Config, name: str, default: float) -> float:
    """A finite number."""
    number = finite_number(config.get(name, default))
    if number is None:
        raise AdapterRejected(field(name), "must be a finite number")
    return number


class BaseCorrection(NamedTuple):
    """What was taken out of the base before training.

    Attributes:
        method: how it was chosen.
        rank: its rank on every module; None where it is that of the module's adapter.
    """

    method: CorrectionMethod
    rank: int | None


def check_common(config: Config, *, correction: bool = False) -> None:
    """Refuse what no format serves (biases, replaced modules, …).

    Args:
        correction: whether the format reads ``base_correction``; refused otherwise.
    """
    bias = config.get("bias")
    if bias not in (None, "none"):
        raise AdapterRejected(field("bias"), "trained biases are not served; must be none")
    _refuse_set(config, _REFUSED_ALWAYS)
    if not correction and is_set(config.get("base_correction")):
        raise AdapterRejected(
            field("base_correction"), "is served with plain LoRA and DoRA only; must be absent"
        )


def check_lora(config: Config) -> None:
    """Refuse LoRA variants, and whatever changes the base weights."""
    check_variants(config)
    if get_bool(config, "use_dora", False):
        raise AdapterRejected(
            field("use_dora"), "DoRA is served with plain LoRA only; must be false"
        )
    changed = get_correction(config)
    if changed is not None:
        raise AdapterRejected(
            field("init_lora_weights"),
            f"{changed.method} trains on changed base weights, which is served with plain LoRA "
            "and DoRA only",
        )


def check_variants(config: Config) -> None:
    """Refuse LoRA variants whose tensors or base differ."""
    _refuse_set(config, _REFUSED_LORA)


def get_correction(config: Config) -> BaseCorrection | None:
    """What was taken out of the base: from ``init_lora_weights`` or our own ``base_correction``.

    ``base_correction`` is an object with ``method`` (pissa, milora or olora) and optionally ``r``.
    It is for adapters whose config cannot say what they are: MiLoRA's is that of plain LoRA.

    Raises:
        AdapterRejected: an initialisation that cannot be repeated, a malformed
            ``base_correction``, or one that contradicts the initialisation.
    """
    init = config.get("init_lora_weights", True)
    found = None
    if isinstance(init, str) and init in _INIT_EXACT:
        found = BaseCorrection(_INIT_EXACT[init], None)
    elif not (init is None or isinstance(init, bool) or init in _INIT_KEEPS_BASE):
        raise AdapterRejected(
            field("init_lora_weights"),
            f"{printable(str(init))} trains on a base that was changed in a way that cannot be "
            f"repeated from the weights alone; must be true, false, "
            f"{', '.join((*_INIT_KEEPS_BASE, *_INIT_EXACT))}. {_CONVERT}",
        )
    told = config.get("base_correction")
    if not is_set(told):
        return found
    where = field("base_correction")
    if not isinstance(told, dict) or set(told) - {"method", "r"}:
        raise AdapterRejected(where, "must be an object with method and, if need be, r")
    method = told.get("method")
    if method not in CORRECTION_METHODS:
        raise AdapterRejected(
            f"{where}.method",
            f"{printable(str(method))} must be {' or '.join(CORRECTION_METHODS)}",
        )
    if found is not None and found.method != method:
        raise AdapterRejected(
            f"{where}.method", f"{method} contradicts init_lora_weights {found.method}"
        )
    rank = told.get("r")
    if rank is not None and (type(rank) is not int or not 1 <= rank < 1 << 31):
        raise AdapterRejected(f"{where}.r", "must be a positive integer")
    return BaseCorrection(cast(CorrectionMethod, method), rank)


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

    def may_be_zero(self, path: str) -> bool:
        """Whether a rank pattern gives this module no rank at all."""
        return any(value == 0 and pattern.matches(path) for pattern, value in self._ranks)

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
        if rank < 1:
            raise AdapterRejected(tensor, "has rank 0")
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
