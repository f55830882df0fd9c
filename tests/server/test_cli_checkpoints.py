"""``shoal adapters convert`` of the SVF and SVFT authors' files, from the file to a merged base."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoal.server.cli import adapters
from shoal.server.model.config import ModelConfig
from shoal.server.model.decoder import Decoder

CONFIG = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
UP = "model.layers.1.mlp.up_proj"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The tensors of ``tmp_path/base``."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shapes = Decoder(ModelConfig.from_hf(CONFIG)).weight_shapes()
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    return tensors


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(verb: str, *arguments: object) -> tuple[int, str, str]:
        parser = argparse.ArgumentParser()
        adapters.add_arguments(parser)
        words = [verb, *(str(argument) for argument in arguments), "--base", tmp_path / "base"]
        capsys.readouterr()
        code = adapters.run(parser.parse_args([str(word) for word in words]))
        return code, *capsys.readouterr()

    return call


def policy(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    vectors = {
        f"learnable_params_module_list.{n}": torch.randn(16, generator=generator) for n in range(6)
    }
    torch.save(vectors, folder / "policy_params.pt")
    return folder / "policy_params.pt"


def trainers(folder: Path, base: dict[str, Tensor]) -> Path:
    """One module with a diagonal of ones at half weight, beside the rest of the model."""
    u, s, v = torch.linalg.svd(base[f"{UP}.weight"], full_matrices=False)
    index = torch.arange(16)
    parts = {"u": -u, "v": -v, "s_pre": s, "s": torch.ones(16), "gate": torch.zeros(1)}
    parts |= {"s_row": index, "s_col": index, "s_pre_row": index, "s_pre_col": index}
    tensors = {f"{UP}.svft_layer.{name}": part.clone() for name, part in parts.items()}
    tensors |= {name: tensor for name, tensor in base.items() if name != f"{UP}.weight"}
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def test_svf_becomes_an_adapter_that_is_served(
    tmp_path: Path, base: dict[str, Tensor], run: Run
) -> None:
    code, out, err = run("convert", policy(tmp_path), tmp_path / "out")
    assert code == 0, err
    assert "svf, 6 targets, vectors not compared" in out
    assert "computing 6 SVDs of base once" in err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    code, out, err = run("check", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "spectral" in out


def test_svft_merges_into_what_its_layer_computes(
    tmp_path: Path, base: dict[str, Tensor], run: Run
) -> None:
    code, out, err = run("convert", trainers(tmp_path, base), tmp_path / "merged", "--merge")
    assert code == 0, err
    assert "base with 1 merged targets" in out
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    u, s, v = torch.linalg.svd(base[f"{UP}.weight"].double(), full_matrices=False)
    want = u * (s + 0.5) @ v
    torch.testing.assert_close(merged[f"{UP}.weight"].double(), want, rtol=0, atol=2e-4)
    assert all(torch.equal(merged[n], t) for n, t in base.items() if n != f"{UP}.weight")


def test_svft_beside_a_trained_norm_writes_nothing(
    tmp_path: Path, base: dict[str, Tensor], run: Run
) -> None:
    path = trainers(tmp_path, base)
    torch.save(torch.load(path) | {"model.norm.weight": torch.zeros(16)}, path)
    code, out, err = run("convert", path, tmp_path / "out")
    assert (code, out) == (1, "")
    assert "model.norm.weight differs from the base's in its values" in err
    assert "hint: the model that the authors' code fuses" in err
    assert not (tmp_path / "out").exists()


def test_other_lone_pickles_still_ask_for_a_config(
    tmp_path: Path, base: dict[str, Tensor], run: Run
) -> None:
    path = tmp_path / "adapter_model.bin"
    torch.save(
        {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 16)}, path
    )
    code, _, err = run("convert", path, tmp_path / "out")
    assert code == 1
    assert "has no adapter_config.json beside it" in err
