"""GGUF files: tiny ones written here, and SmolLM2 against transformers."""

import contextlib
import random
import struct
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.server.engine.plan import Row
from shoal.server.engine.request import SamplingParams
from shoal.server.model.batch import Batch
from shoal.server.model.config import ModelConfig, ModelError
from shoal.server.model.decoder import Decoder, rope_frequencies
from shoal.server.model.gguf import GGUFFile
from shoal.server.model.kv_cache import KVCache
from shoal.server.model.pull import smollm2_path
from shoal.server.model.weights import exact_weight_of, load_model, read_config

HF: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "eos_token_id": [7, 9],
    "bos_token_id": 1,
    "sliding_window": None,
}
GEMMA = {"sliding_window": 8, "tie_word_embeddings": True, "query_pre_attn_scalar": 16}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-biases": {"model_type": "llama", "attention_bias": True},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3"},
    "gemma2": {"model_type": "gemma2", **GEMMA},
    "gemma3": {
        "model_type": "gemma3_text",
        **GEMMA,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0}
        },
    },
}
# Written out here, not imported: the names llama.cpp gives the tensors.
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_NAMES = {
    "pre_feedforward_layernorm": "ffn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, arch: str) -> str:
    stem, kind = name.rsplit(".", 1)
    table = NAMES | GEMMA_NAMES if arch.startswith("gemma") else NAMES
    if stem in table:
        return f"{table[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{table[rest]}.{kind}"


def permuted(weight: Tensor, heads: int) -> Tensor:
    """How llama.cpp reorders the rows of q and k."""
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, hf: dict[str, Any], tensors: dict[str, Tensor], **extra: Any) -> Path:
    """Write a model as llama.cpp's converter would."""
    arch = str(hf["model_type"]).removesuffix("_text")
    writer = gguf.GGUFWriter(path, arch)
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf["num_key_value_heads"])
    writer.add_key_length(hf["head_dim"])
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    writer.add_rope_freq_base(hf["rope_theta"])
    writer.add_token_list([f"t{i}".encode() for i in range(hf["vocab_size"])])
    writer.add_eos_token_id(7)
    writer.add_eot_token_id(9)
    writer.add_bos_token_id(1)
    if arch.startswith("gemma"):
        writer.add_sliding_window(hf["sliding_window"])
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)
    if arch == "gemma3":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)
    for name, tensor in tensors.items():
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            tensor = permuted(
                tensor, hf["num_attention_heads" if "q_" in name else "num_key_value_heads"]
            )
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        writer.add_tensor(gguf_name(name, arch), tensor.numpy(), **extra)
    if "divisors" in hf:
        writer.add_tensor("rope_freqs.weight", np.array(hf["divisors"], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors_of(config: ModelConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = Decoder(config).weight_shapes()
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@torch.inference_mode()
def logits(decoder: Decoder, ids: list[int]) -> Tensor:
    kv = KVCache(decoder.config, num_blocks=16, block_tokens=16, device="cpu", dtype=decoder.dtype)
    row = Row(
        request_id="r",
        token_ids=tuple(ids),
        start=0,
        block_ids=tuple(range(16)),
        sample=True,
        sampling=SamplingParams(max_tokens=1),
    )
    return decoder.logits(decoder(Batch.from_rows([row], block_tokens=16), kv))


@pytest.mark.parametrize("case", CASES)
def test_a_gguf_is_the_model_it_was_made_from(case: str, tmp_path: Path) -> None:
    hf = HF | CASES[case]
    config = ModelConfig.from_hf(hf)
    tensors = tensors_of(config)
    decoder = load_model(
        write_gguf(tmp_path / "m.gguf", hf, tensors), device="cpu", dtype=torch.float32
    )
    for field in ModelConfig.__slots__:
        got, want = getattr(decoder.config, field), getattr(config, field)
        if field == "norm_eps":
            assert got == pytest.approx(want)  # float32 in the file
        else:
            assert got == want, field
    original = Decoder(config)
    for name, tensor in tensors.items():
        original.load_weight(name, tensor)
    half = load_model(tmp_path / "m.gguf", device="cpu", dtype=torch.bfloat16)
    exact = exact_weight_of(half, tmp_path / "m.gguf")
    for target in config.base_shape("x", "").targets():
        assert torch.equal(decoder.weight_of(target), original.weight_of(target))
        assert torch.equal(exact(target), original.weight_of(target))
    ids = list(range(5, 25))
    torch.testing.assert_close(logits(decoder, ids), logits(original, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_every_quantisation_comes_back_near_what_it_was(kind: str, tmp_path: Path) -> None:
    hf = HF | {"model_type": "qwen3"}
    config = ModelConfig.from_hf(hf)
    tensors = tensors_of(config)
    path = tmp_path / "m.gguf"
    quantization = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "qwen3")
    for name in ("embedding_length", "feed_forward_length", "block_count", "context_length"):
        value = {"embedding_length": 64, "feed_forward_length": 96, "block_count": 2}
        getattr(writer, f"add_{name}")(value.get(name, 128))
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(64)
    for name, tensor in tensors.items():
        data = tensor.numpy()
        if tensor.ndim == 2:
            packed = gguf.quants.quantize(data, quantization)
            writer.add_tensor(gguf_name(name, "qwen3"), packed, raw_dtype=quantization)
        else:
            writer.add_tensor(gguf_name(name, "qwen3"), data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    got = dict(GGUFFile(path).tensors())
    assert set(got) == set(tensors)
    for name, tensor in tensors.items():
        assert float((got[name] - tensor).abs().max()) < (0.3 if kind == "Q4_1" else 0.03)


def test_llama3_scaling_is_read_from_its_tensor(tmp_path: Path) -> None:
    divisors = [1.0] * 5 + [8.0] * 3
    hf = HF | {"model_type": "llama", "divisors": divisors}
    tensors = tensors_of(ModelConfig.from_hf(HF | {"model_type": "llama"}))
    config = read_config(write_gguf(tmp_path / "m.gguf", hf, tensors))
    plain = ModelConfig.from_hf(HF | {"model_type": "llama"})
    got, _ = rope_frequencies(config.ropes[0], 16)
    want, _ = rope_frequencies(plain.ropes[0], 16)
    torch.testing.assert_close(got * torch.tensor(divisors), want)
    load_model(tmp_path / "m.gguf", device="cpu", dtype=torch.float32)


def test_damaged_and_foreign_files_are_refused_with_their_reason(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    hf = HF | {"model_type": "llama"}
    write_gguf(path, hf, tensors_of(ModelConfig.from_hf(hf)))
    whole = path.read_bytes()

    def refusal(data: bytes) -> str:
        path.write_bytes(data)
        with pytest.raises(ModelError) as caught:
            load_model(path, device="cpu", dtype=torch.float32)
        return str(caught.value)

    assert "begin with GGUF" in refusal(b"GGML" + whole[4:])
    assert "version 1" in refusal(whole[:4] + struct.pack("<I", 1) + whole[8:])
    assert "ends early" in refusal(whole[:200])
    assert "cannot be read" in refusal(whole[:-64])
    assert "'bert'" in refusal(
        whole.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x04\0\0\0\0\0\0\0bert", 1)
    )
    assert "cannot be read" in refusal(b"")
    path.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        GGUFFile(path)


def test_any_damage_to_a_header_is_an_error_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    hf = HF | {"model_type": "llama", "num_hidden_layers": 1}
    write_gguf(path, hf, tensors_of(ModelConfig.from_hf(hf)))
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(4000)] = rng.randrange(256)
        path.write_bytes(data)
        with contextlib.suppress(ModelError):
            file = GGUFFile(path)
            file.config()
            list(file.tensors())


@pytest.fixture(scope="module")
def smollm2() -> Path:
    path = smollm2_path()
    assert path.is_file(), "run `shoal pull smollm2` first"
    return path


@pytest.mark.model
def test_smollm2_gives_the_logits_of_transformers(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM

    decoder = load_model(smollm2, device="cpu", dtype=torch.float32)
    ids = [1, 4093, 198, 19556, 905, 30, 2, 198, 1, 520, 9531, 198]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own
        reference = AutoModelForCausalLM.from_pretrained(
            smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
        )
    with torch.inference_mode():
        want = reference(torch.tensor([ids])).logits[0]
    got = logits(decoder, ids)
    assert float((got - want).abs().max()) <= 1e-4 * float(want.max() - want.min())
    assert got.argmax(-1).tolist() == want.argmax(-1).tolist()
