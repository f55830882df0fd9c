"""``ModelConfig``: what a base model is made of, read from a Hugging Face ``config.json``.

Pure: no tensor library. It owns the differences between architectures, so that ``decoder.py`` is
one model with switches, and refuses what that model could not compute exactly.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from shoal.adapters.spec import BaseShape, Dims

RopeKind = Literal["default", "linear", "llama3", "yarn"]
Activation = Literal["silu", "gelu_tanh", "gelu"]


MAX_LAYERS = 1024  # far above any model; a damaged file must not ask for billions


class ModelError(Exception):
    """The base model cannot be loaded or served; the text says what, where and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding of some layers.

    Attributes:
        theta: base of the wavelengths.
        kind: how frequencies are stretched beyond the original context.
        factor: the stretch (``linear``, ``llama3``, ``yarn``).
        original_context: positions of the original training (``llama3``, ``yarn``).
        low_freq_factor, high_freq_factor: ``llama3``'s band.
        beta_fast, beta_slow, truncate: ``yarn``'s band, in rotations.
        attention_factor: multiplies cos and sin (``yarn``), else 1.
        divisors: per frequency, ``head_dim / 2`` numbers that frequencies are divided by
            (how a GGUF stores ``llama3`` scaling), or empty.
    """

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    divisors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shapes and switches of a decoder-only transformer.

    Attributes:
        architecture: Hugging Face ``model_type`` of the text model.
        max_model_len: positions the model was made for.
        norm_plus_one: RMSNorm multiplies by ``1 + weight`` (Gemma) instead of ``weight``.
        sandwich_norms: further norms on the outputs of attention and MLP (Gemma 2 and 3).
        qk_norm: RMSNorm over the head dimension of queries and keys, before the rotation.
        attention_scale: multiplies ``q·k``.
        attention_softcap, logits_softcap: ``c·tanh(x/c)`` on scores and on logits, or None.
        embedding_scale: multiplies token embeddings.
        windows: per layer, how many positions a token sees (itself included), or None for all.
        ropes: per layer.
        eos_token_ids: tokens that end a text.
        dtype: the checkpoint's own type, such as ``"bfloat16"``, when it says so.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int
    norm_eps: float
    activation: Activation
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    norm_plus_one: bool
    sandwich_norms: bool
    attention_scale: float
    attention_softcap: float | None
    logits_softcap: float | None
    embedding_scale: float
    windows: tuple[int | None, ...]
    ropes: tuple[Rope, ...]
    eos_token_ids: frozenset[int]
    bos_token_id: int | None = None
    dtype: str | None = None

    @property
    def q_size(self) -> int:
        """Columns of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    def base_shape(self, name: str, digest: str) -> BaseShape:
        """What an adapter of this model must fit.

        Args:
            name: the base's served name.
            digest: identifies its weights (``shoal.adapters.base.base_digest``).
        """
        hidden, inner = self.hidden_size, self.intermediate_size
        dims = {
            "q_proj": Dims(self.q_size, hidden),
            "k_proj": Dims(self.kv_size, hidden),
            "v_proj": Dims(self.kv_size, hidden),
            "o_proj": Dims(hidden, self.q_size),
            "gate_proj": Dims(inner, hidden),
            "up_proj": Dims(inner, hidden),
            "down_proj": Dims(hidden, inner),
        }
        return BaseShape(name=name, digest=digest, num_layers=self.num_layers, dims=dims)

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None
    ) -> "ModelConfig":
        """Read a Hugging Face configuration, in the spelling of transformers 4 or 5.

        Args:
            config: parsed ``config.json``. Of a multimodal Gemma 3, the text part is taken.
            generation: parsed ``generation_config.json``: chat models list their real ends of
                sequence there.

        Raises:
            ModelError: an architecture or option that is not supported, or a missing field.
        """
        text = _text_part(config)
        arch = str(text.get("model_type"))
        if arch not in _DEFAULTS:
            raise ModelError(
                f"architecture {arch!r} is not supported; supported: {', '.join(sorted(_DEFAULTS))}"
            )
        if config.get("quantization_config") or text.get("quantization_config"):
            raise ModelError("the checkpoint is quantised; use unquantised safetensors or a GGUF")
        fields = {**_COMMON, **_DEFAULTS[arch], **text}
        try:
            return _build(arch, fields, config, generation or {})
        except (TypeError, ValueError, AttributeError) as error:  # a field of the wrong type
            raise ModelError(f"the model's configuration is malformed: {error}") from error


# What transformers assumes when a field is absent; saved configs rely on it.
_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
}
_GEMMA: dict[str, Any] = {
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "eos_token_id": 2, "bos_token_id": 1},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "eos_token_id": 2,
        "bos_token_id": 1,
    },
    "qwen2": {"sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
    "gemma": _GEMMA,
    "gemma2": _GEMMA
    | {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    "gemma3_text": _GEMMA
    | {
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
}
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    if config.get("model_type") != "gemma3":
        return config
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise ModelError("config.json of a 'gemma3' model has no text_config")
    # The outer level keeps what generation needs, and the inner level wins where both speak.
    outer = {k: config[k] for k in ("eos_token_id", "bos_token_id", "dtype") if k in config}
    return {**outer, **text, "model_type": "gemma3_text"}


def _build(
    arch: str, c: Mapping[str, Any], outer: Mapping[str, Any], generation: Mapping[str, Any]
) -> ModelConfig:
    gemma = arch.startswith("gemma")
    sandwich = arch in ("gemma2", "gemma3_text")
    hidden, heads, layers = (
        _positive(c, field) for field in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    if layers > MAX_LAYERS:
        raise ModelError(f"num_hidden_layers is {layers}, expected at most {MAX_LAYERS}")
    kv_heads = int(c.get("num_key_value_heads") or heads)
    head_dim = int(c.get("head_dim") or hidden // heads)
    if heads % kv_heads:
        raise ModelError(f"{heads} attention heads are not a multiple of {kv_heads} kv heads")
    if head_dim % 2:
        raise ModelError(f"head_dim {head_dim} is odd: rotary embeddings need pairs")
    if c.get("use_bidirectional_attention"):
        raise ModelError("use_bidirectional_attention is set: only causal models can be served")
    bias = bool(c.get("attention_bias", False))
    scalar = float(c["query_pre_attn_scalar"]) if sandwich else float(head_dim)
    types = _layer_types(arch, c, layers)
    window = int(c["sliding_window"]) if "sliding_attention" in types else None
    return ModelConfig(
        architecture=arch,
        vocab_size=_positive(c, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_positive(c, "intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_model_len=_positive(c, "max_position_embeddings"),
        norm_eps=float(c["rms_norm_eps"]),
        activation=_activation(arch, c),
        tie_word_embeddings=bool(c["tie_word_embeddings"]),
        qkv_bias=bias or arch == "qwen2",
        o_bias=bias and arch not in ("qwen2", "mistral"),
        mlp_bias=arch == "llama" and bool(c.get("mlp_bias", False)),
        qk_norm=arch in ("qwen3", "gemma3_text"),
        norm_plus_one=gemma,
        sandwich_norms=sandwich,
        attention_scale=scalar**-0.5,
        attention_softcap=_softcap(c, "attn_logit_softcapping") if arch == "gemma2" else None,
        logits_softcap=_softcap(c, "final_logit_softcapping") if sandwich else None,
        embedding_scale=math.sqrt(hidden) if gemma else 1.0,
        windows=tuple(window if kind == "sliding_attention" else None for kind in types),
        ropes=_ropes(arch, c, types),
        eos_token_ids=_token_ids(c.get("eos_token_id"))
        | _token_ids(generation.get("eos_token_id")),
        bos_token_id=min(_token_ids(c.get("bos_token_id")), default=None),
        dtype=_dtype_name(c, outer),
    )


def _positive(c: Mapping[str, Any], field: str) -> int:
    value = c.get(field)
    if not isinstance(value, int) or value <= 0:
        raise ModelError(f"config.json: {field} is {value!r}, expected a positive integer")
    return value


def _softcap(c: Mapping[str, Any], field: str) -> float | None:
    value = c.get(field)
    return float(value) if value else None


def _activation(arch: str, c: Mapping[str, Any]) -> Activation:
    name = str((c.get("hidden_activation") if arch != "gemma" else None) or c["hidden_act"])
    if arch == "gemma" and name == "gelu":  # early Gemma files say gelu and mean its tanh form
        return "gelu_tanh"
    if name not in _ACTIVATIONS:
        raise ModelError(f"hidden activation {name!r} is not one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _dtype_name(c: Mapping[str, Any], outer: Mapping[str, Any]) -> str | None:
    for source in (c, outer):
        for field in ("dtype", "torch_dtype"):  # transformers 5, then 4
            if source.get(field):
                return str(source[field]).removeprefix("torch.")
    return None


def _token_ids(value: Any) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset(int(v) for v in (value if isinstance(value, list | tuple) else [value]))


def _layer_types(arch: str, c: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    """``full_attention`` or ``sliding_attention`` per layer, by each architecture's own rule."""
    window = c.get("sliding_window")
    if window is None or arch in ("llama", "gemma"):
        return ("full_attention",) * layers
    if arch in ("qwen2", "qwen3") and not c.get("use_sliding_window", False):
        return ("full_attention",) * layers
    if arch == "mistral":  # transformers slides every layer, whatever layer_types says
        return ("sliding_attention",) * layers
    types = c.get("layer_types")
    if types is None:
        if arch in ("qwen2", "qwen3"):
            slides = [i >= c["max_window_layers"] for i in range(layers)]
        else:
            pattern = 2 if arch == "gemma2" else int(c["sliding_window_pattern"])
            slides = [(i + 1) % pattern != 0 for i in range(layers)]
        return tuple("sliding_attention" if s else "full_attention" for s in slides)
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown or len(types) != layers:
        raise ModelError(
            f"layer_types has {len(types)} entries of {sorted(set(types))}, expected {layers} of "
            "full_attention or sliding_attention"
        )
    return tuple(types)


def _ropes(arch: str, c: Mapping[str, Any], types: tuple[str, ...]) -> tuple[Rope, ...]:
    context = int(c["max_position_embeddings"])
    theta = float(c.get("rope_theta") or 10_000.0)
    new, old = c.get("rope_parameters") or {}, c.get("rope_scaling") or {}
    nested = {kind: new.get(kind) for kind in ("full_attention", "sliding_attention")}
    if any(nested.values()):
        full, local = nested["full_attention"] or {}, nested["sliding_attention"] or {}
    else:
        full, local = {**new, **old}, {}
    if arch != "gemma3_text" and not local:
        local = full
    local_theta = float(c.get("rope_local_base_freq") or theta)
    by_type = {
        "full_attention": _rope(full, theta, context, c),
        "sliding_attention": _rope(local, local_theta, context, c),
    }
    return tuple(by_type[kind] for kind in types)


def _rope(p: Mapping[str, Any], theta: float, context: int, c: Mapping[str, Any]) -> Rope:
    kind = p.get("rope_type") or p.get("type") or "default"
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ModelError(f"rope type {kind!r} is not one of default, linear, llama3, yarn")
    partial = p.get("partial_rotary_factor", c.get("partial_rotary_factor")) or 1.0
    if partial != 1.0 or p.get("mrope_section"):
        raise ModelError("partial and multi-section rotary embeddings are not supported")
    theta = float(p.get("rope_theta") or theta)
    divisors = tuple(float(v) for v in p.get("divisors") or ())  # only gguf.py writes these
    if kind == "default":
        return Rope(theta=theta, divisors=divisors)
    if not p.get("factor") and kind != "yarn":
        raise ModelError(f"rope type {kind!r} needs a factor")
    original = int(
        c.get("original_max_position_embeddings")
        or p.get("original_max_position_embeddings")
        or context
    )
    factor = float(p.get("factor") or context / original)
    if kind == "linear":
        return Rope(theta=theta, kind="linear", factor=factor, divisors=divisors)
    if kind == "llama3":
        missing = [f for f in ("low_freq_factor", "high_freq_factor") if f not in p]
        if missing:
            raise ModelError(f"rope type 'llama3' needs {' and '.join(missing)}")
        return Rope(
            theta=theta,
            kind="llama3",
            factor=factor,
            original_context=original,
            low_freq_factor=float(p["low_freq_factor"]),
            high_freq_factor=float(p["high_freq_factor"]),
        )
    return Rope(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_context=original,
        beta_fast=float(p.get("beta_fast") or 32.0),
        beta_slow=float(p.get("beta_slow") or 1.0),
        truncate=bool(p.get("truncate", True)),
        attention_factor=_yarn_attention_factor(p, factor),
    )


def _yarn_attention_factor(p: Mapping[str, Any], factor: float) -> float:
    """Equation 22 of the YaRN paper (arXiv:2309.00071), with DeepSeek's ``mscale`` refinement."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])
    if p.get("mscale") and p.get("mscale_all_dim"):
        return mscale(float(p["mscale"])) / mscale(float(p["mscale_all_dim"]))
    return mscale(1.0)
