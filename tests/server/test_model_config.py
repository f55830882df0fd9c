"""What is read from config.json, in every spelling in use, and what is refused."""

from typing import Any

import pytest

from shoal.adapters.spec import Dims
from shoal.server.model.config import ModelConfig, ModelError, Rope

LLAMA_31_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
# Gemma 3 4B as published: a multimodal config whose text part leaves nearly all to defaults.
GEMMA_3_4B: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "eos_token_id": [1, 106],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152},
}


def llama(**changes: Any) -> ModelConfig:
    return ModelConfig.from_hf(LLAMA_31_8B | changes)


def test_llama_31() -> None:
    config = llama()
    assert (config.head_dim, config.q_size, config.kv_size) == (128, 4096, 1024)
    assert config.eos_token_ids == {128001, 128008, 128009}
    assert config.windows == (None,) * 32
    assert config.dtype == "bfloat16"
    assert config.ropes[31] == Rope(
        theta=500000.0,
        kind="llama3",
        factor=8.0,
        original_context=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    shape = config.base_shape("llama", "digest")
    assert shape.num_layers == 32
    assert shape.dims["k_proj"] == Dims(1024, 4096)
    assert shape.dims["down_proj"] == Dims(4096, 14336)
    assert shape.group_dims("qkv") == Dims(6144, 4096)


def test_both_spellings_of_rope_and_dtype_mean_the_same() -> None:
    new = {k: v for k, v in LLAMA_31_8B.items() if not k.startswith(("rope", "torch"))}
    new["rope_parameters"] = {**LLAMA_31_8B["rope_scaling"], "rope_theta": 500000.0}
    new["dtype"] = "bfloat16"
    assert ModelConfig.from_hf(new) == llama()


def test_gemma_3_of_a_multimodal_config_takes_the_text_part_and_its_defaults() -> None:
    config = ModelConfig.from_hf(GEMMA_3_4B, {"eos_token_id": [1, 106]})
    assert config.architecture == "gemma3_text"
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert (config.vocab_size, config.max_model_len) == (262208, 131072)
    assert config.windows[:7] == (1024,) * 5 + (None,) + (1024,)
    assert config.ropes[0] == Rope(theta=1e4)
    assert config.ropes[5] == Rope(theta=1e6, kind="linear", factor=8.0)
    assert config.eos_token_ids == {1, 106}
    assert config.dtype == "bfloat16"
    assert config.embedding_scale == 2560**0.5
    assert config.attention_scale == 1 / 16
    assert config.qk_norm
    assert config.sandwich_norms
    assert config.norm_plus_one
    assert config.logits_softcap is None


def test_gemma_2_alternates_windows_and_caps() -> None:
    config = ModelConfig.from_hf(
        {
            "model_type": "gemma2",
            "vocab_size": 256000,
            "hidden_size": 4608,
            "intermediate_size": 36864,
            "num_hidden_layers": 4,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "query_pre_attn_scalar": 144,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
        }
    )
    assert config.windows == (4096, None, 4096, None)
    assert (config.attention_softcap, config.logits_softcap) == (50.0, 30.0)
    assert config.attention_scale == 144**-0.5
    assert config.activation == "gelu_tanh"


@pytest.mark.parametrize("act", [{"hidden_act": "gelu"}, {"hidden_activation": None}, {}])
def test_gemma_1_always_means_the_tanh_form_of_gelu(act: dict[str, Any]) -> None:
    config = ModelConfig.from_hf(
        {
            "model_type": "gemma",
            "vocab_size": 256000,
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            **act,
        }
    )
    assert config.activation == "gelu_tanh"
    assert config.head_dim == 256
    assert not config.sandwich_norms


def test_qwen_slides_only_when_told_to_and_only_its_upper_layers() -> None:
    qwen = LLAMA_31_8B | {
        "model_type": "qwen2",
        "sliding_window": 1000,
        "max_window_layers": 30,
        "rope_scaling": None,
    }
    still = ModelConfig.from_hf(qwen | {"use_sliding_window": False})
    assert still.windows == (None,) * 32
    sliding = ModelConfig.from_hf(qwen | {"use_sliding_window": True})
    assert sliding.windows == (None,) * 30 + (1000,) * 2
    assert (still.qkv_bias, still.o_bias, still.qk_norm) == (True, False, False)
    third = ModelConfig.from_hf(qwen | {"model_type": "qwen3", "head_dim": 64})
    assert (third.qkv_bias, third.qk_norm, third.head_dim) == (False, True, 64)


def test_mistral_without_a_window_sees_everything() -> None:
    mistral = LLAMA_31_8B | {"model_type": "mistral", "rope_scaling": None}
    assert ModelConfig.from_hf(mistral | {"sliding_window": None}).windows == (None,) * 32
    assert ModelConfig.from_hf(mistral | {"sliding_window": 100}).windows == (100,) * 32


def test_yarn_takes_its_factor_from_the_contexts_when_it_has_none() -> None:
    yarn = {"type": "yarn", "original_max_position_embeddings": 32768}
    (rope, *_) = llama(rope_scaling=yarn).ropes
    assert (rope.kind, rope.factor, rope.original_context) == ("yarn", 4.0, 32768)
    assert rope.attention_factor == pytest.approx(1.1386, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"model_type": "mamba"}, ["mamba", "llama", "qwen3", "gemma3_text"]),
        ({"model_type": None}, ["None", "supported"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["dynamic", "yarn"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, ["low_freq_factor"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["linear", "factor"]),
        ({"partial_rotary_factor": 0.5}, ["partial"]),
        ({"hidden_act": "relu"}, ["relu", "silu"]),
        ({"num_key_value_heads": 5}, ["32", "5"]),
        ({"head_dim": 63}, ["63", "odd"]),
        ({"vocab_size": None}, ["vocab_size", "None"]),
        ({"hidden_size": "4096"}, ["hidden_size", "'4096'"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantised"]),
        ({"use_bidirectional_attention": True}, ["causal"]),
        ({"model_type": "gemma3"}, ["text_config"]),
        ({"num_hidden_layers": 2**31}, ["num_hidden_layers", "1024"]),
        ({"rms_norm_eps": "small"}, ["malformed", "small"]),
        ({"rope_scaling": "llama3"}, ["malformed"]),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(
    changes: dict[str, Any], names: list[str]
) -> None:
    with pytest.raises(ModelError) as refusal:
        llama(**changes)
    for name in names:
        assert name in str(refusal.value)
