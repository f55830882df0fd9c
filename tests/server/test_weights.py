"""Checkpoints in every shape they come in, and the messages for those that do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from shoal.adapters.spec import Target
from shoal.server.model.config import ModelConfig, ModelError
from shoal.server.model.decoder import Decoder
from shoal.server.model.weights import (
    default_dtype,
    exact_weight_of,
    load_model,
    read_config,
)

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GEMMA3: dict[str, Any] = {"model_type": "gemma3", "text_config": CONFIG | {"head_dim": 8}}


def tensors_of(config: dict[str, Any]) -> dict[str, Tensor]:
    shapes = Decoder(ModelConfig.from_hf(config)).weight_shapes()
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors")
    return path


def load(path: Path, **options: Any) -> Decoder:
    return load_model(path, **{"device": "cpu", "dtype": torch.float32} | options)


def test_a_single_file_lands_in_the_fused_weights(tmp_path: Path) -> None:
    tensors = tensors_of(CONFIG)
    decoder = load(write(tmp_path, CONFIG, tensors))
    for target in decoder.config.base_shape("x", "").targets():
        part = "mlp" if target.module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        want = tensors[f"model.layers.{target.layer}.{part}.{target.module}.weight"]
        assert torch.equal(decoder.weight_of(target), want)
    assert torch.equal(decoder.head, tensors["lm_head.weight"])
    assert torch.equal(decoder.norm.weight, tensors["model.norm.weight"])


def test_shards_load_like_one_file(tmp_path: Path) -> None:
    tensors = tensors_of(CONFIG)
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    decoder = load(tmp_path)
    want = tensors["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(decoder.weight_of(Target(1, "up_proj")), want)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"b\.safetensors is missing"):
        load(tmp_path)


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
def test_a_multimodal_checkpoint_gives_its_text_part(tmp_path: Path, prefix: str) -> None:
    tensors = tensors_of(GEMMA3)
    renamed = {prefix + name: tensor for name, tensor in tensors.items()}
    if prefix.startswith("model."):  # transformers 5 moved the prefix inwards
        renamed = {name.replace(".model.", "."): tensor for name, tensor in renamed.items()}
    extra = {"vision_tower.x": torch.zeros(1), "multi_modal_projector.y": torch.zeros(1)}
    decoder = load(write(tmp_path, GEMMA3, renamed | extra))
    want = tensors["model.layers.0.self_attn.v_proj.weight"]
    assert torch.equal(decoder.weight_of(Target(0, "v_proj")), want)
    assert torch.equal(decoder.norm.weight, tensors["model.norm.weight"] + 1)


def test_a_tied_model_ignores_the_copy_some_files_hold(tmp_path: Path) -> None:
    tied = CONFIG | {"tie_word_embeddings": True}
    tensors = tensors_of(tied) | {"lm_head.weight": torch.zeros(32, 16)}
    decoder = load(write(tmp_path, tied, tensors))
    assert torch.equal(decoder.head, tensors["model.embed_tokens.weight"])


def test_weights_are_converted_to_the_asked_dtype_and_norms_stay_float32(tmp_path: Path) -> None:
    path = write(tmp_path, CONFIG, tensors_of(CONFIG))
    decoder = load(path, dtype=torch.bfloat16)
    assert decoder.weight_of(Target(0, "q_proj")).dtype == torch.bfloat16
    assert decoder.norm.weight.dtype == torch.float32


def test_misfits_are_named(tmp_path: Path) -> None:
    tensors = tensors_of(CONFIG)
    lacking = {k: v for k, v in tensors.items() if "layers.1.mlp" not in k}
    with pytest.raises(ModelError, match=r"lacks 3 tensors \(model\.layers\.1\.mlp\.down_proj"):
        load(write(tmp_path, CONFIG, lacking))
    surplus = tensors | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)}
    with pytest.raises(ModelError, match=r"1 tensor \(model\.layers\.0\.self_attn\.q_proj\.bias"):
        load(write(tmp_path, CONFIG, surplus))
    bent = tensors | {"model.norm.weight": torch.zeros(17)}
    with pytest.raises(ModelError, match=r"model\.norm\.weight.*\(17,\).*\(16,\)"):
        load(write(tmp_path, CONFIG, bent))


def test_unreadable_models_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="not a JSON object"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="safetensors files only"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match="cannot be read"):
        load(tmp_path)


def test_a_truncated_file_is_an_error_and_not_half_a_model(tmp_path: Path) -> None:
    file = write(tmp_path, CONFIG, tensors_of(CONFIG)) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be read"):
        load(tmp_path)


def test_dummy_weights_have_the_real_shapes_and_stay_finite(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    one, two = load(tmp_path, load_format="dummy"), load(tmp_path, load_format="dummy")
    weight = one.weight_of(Target(1, "gate_proj"))
    assert weight.shape == (24, 16)
    assert 0.01 < float(weight.std()) < 0.03
    assert torch.equal(weight, two.weight_of(Target(1, "gate_proj")))
    assert torch.equal(one.norm.weight, torch.ones(16))


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("served", [torch.float32, torch.float16, torch.bfloat16])
def test_exact_weights_are_the_checkpoints_whatever_dtype_is_served(
    tmp_path: Path, stored: torch.dtype, served: torch.dtype
) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in tensors_of(CONFIG).items()}
    # What the config claims is not what decides.
    write(tmp_path, CONFIG | {"torch_dtype": "bfloat16"}, tensors)
    decoder = load(tmp_path, dtype=served)
    weight = exact_weight_of(decoder, tmp_path)(Target(1, "k_proj"))
    assert torch.equal(weight.float(), tensors["model.layers.1.self_attn.k_proj.weight"].float())
    if stored == served:  # and then the checkpoint is not read twice
        assert weight.data_ptr() == decoder.weight_of(Target(1, "k_proj")).data_ptr()


def test_exact_weights_are_read_one_by_one(tmp_path: Path) -> None:
    tensors = tensors_of(CONFIG)
    write(tmp_path, CONFIG, tensors)
    weight_of = exact_weight_of(load(tmp_path, dtype=torch.bfloat16), tmp_path)
    target = Target(0, "up_proj")
    first, again = weight_of(target), weight_of(target)
    assert first.dtype == torch.float32
    assert first.data_ptr() != again.data_ptr()  # neither kept, nor a view of a whole model
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(OSError, match="header"):
        weight_of(target)


def test_end_of_sequence_ids_come_from_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"eos_token_id": 5}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9]}))
    assert read_config(tmp_path).eos_token_ids == {5, 9}


def test_auto_dtype_is_float32_on_a_cpu_and_16_bits_elsewhere() -> None:
    config = ModelConfig.from_hf(CONFIG)
    half = ModelConfig.from_hf(CONFIG | {"torch_dtype": "float16"})
    assert default_dtype(half, "cpu") == torch.float32
    assert default_dtype(half, "cuda") == torch.float16
    assert default_dtype(config, "cuda") == torch.bfloat16
