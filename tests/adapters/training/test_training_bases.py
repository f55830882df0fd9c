"""Bases that cannot be trained on, or not with these options: refused before a file is written."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
from safetensors.torch import load_file, save_file

from shoal.adapters.training.config import MethodName, TrainConfig
from shoal.adapters.training.errors import BaseRejected, OptionRejected
from shoal.adapters.training.trainer import train


class Lab(Protocol):
    """The fixture of this folder's conftest.py."""

    base: Path
    data: Path
    root: Path

    def config(self, name: str, **options: Any) -> TrainConfig: ...
    def train(self, name: str, **options: Any) -> Any: ...


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def without_a_tensor(base: Path) -> None:
    weights = base / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})


def with_a_layer_more(base: Path) -> None:
    change(base / "config.json", num_hidden_layers=3)


def with_another_vocabulary(base: Path) -> None:
    change(base / "config.json", vocab_size=100)


def cut_short(base: Path) -> None:
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])


def with_tokens_that_the_model_lacks(base: Path) -> None:
    weights = base / "model.safetensors"
    tensors = load_file(weights)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:80].clone()
    save_file(tensors, weights, metadata={"format": "pt"})
    change(base / "config.json", vocab_size=80)


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        (without_a_tensor, "lacks 1 of the model's weights, such as model.layers.1.mlp.up_proj"),
        (with_a_layer_more, "lacks 9 of the model's weights"),
        (with_another_vocabulary, r"of \(258, 32\), where its config says \(100, 32\)"),
        (cut_short, "cannot be loaded"),
        (with_tokens_that_the_model_lacks, "a tokenizer that is not the model's"),
    ],
)
def test_a_base_that_is_not_whole_is_refused(
    spoil: Callable[[Path], None], rule: str, lab: Lab
) -> None:
    base = lab.root / "spoilt"
    shutil.copytree(lab.base, base)
    spoil(base)
    with pytest.raises(BaseRejected, match=rule):
        lab.train("run", base=base, steps=1)
    assert not (lab.root / "run").exists()


def test_a_damaged_gguf_file_is_refused(lab: Lab) -> None:
    path = lab.root / "model.gguf"
    path.write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(BaseRejected, match="cannot be loaded"):
        lab.train("run", base=path)


def test_records_may_not_be_longer_than_the_bases_context(lab: Lab) -> None:
    base = lab.root / "short"
    shutil.copytree(lab.base, base)
    change(base / "config.json", max_position_embeddings=40)
    with pytest.raises(OptionRejected, match="must not exceed 40, the base's context"):
        lab.train("run", base=base, max_length=41)
    assert lab.train("run", base=base, max_length=40, steps=1).finished
    # Who asks for no length has what fits.
    assert lab.train("other", base=base, steps=1).finished


def test_a_padding_token_that_the_model_lacks_does_no_harm(lab: Lab) -> None:
    base = lab.root / "padded"
    shutil.copytree(lab.base, base)
    added = {"id": 258, "content": "[PAD]", "special": True, "normalized": False, "lstrip": False}
    file = base / "tokenizer.json"
    tokens = json.loads(file.read_text())["added_tokens"]
    change(file, added_tokens=[*tokens, {**added, "rstrip": False, "single_word": False}])
    change(base / "tokenizer_config.json", pad_token="[PAD]")
    assert lab.train("run", base=base, steps=2).finished


def test_completions_for_a_base_without_an_end_token_are_warned_about(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    base = lab.root / "endless"
    shutil.copytree(lab.base, base)
    change(base / "tokenizer_config.json", eos_token=None)
    lab.data.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    with caplog.at_level(logging.WARNING, "shoal"):
        assert lab.train("run", base=base, steps=1).finished
    assert "no end token" in caplog.text


@pytest.mark.parametrize("method", ["lora-xs", "pissa", "svf"])
def test_a_home_that_cannot_be_written_costs_time_and_nothing_else(
    method: MethodName, lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    lab.train("usual", method=method, steps=2)
    (lab.root / "file").write_text("")
    with caplog.at_level(logging.WARNING, "shoal"):
        config = lab.config("run", method=method, steps=2)
        assert train(config, cache_dir=lab.root / "file/bases", progress=False).finished
    assert "kept for the next start" in caplog.text
    name = "adapter_model.safetensors"
    assert (lab.root / "run" / name).read_bytes() == (lab.root / "usual" / name).read_bytes()
