"""A tiny base with a chat template, data to memorise, and a short way to train."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from shoal.adapters.training.config import TrainConfig
from shoal.adapters.training.lanes import Lane
from shoal.adapters.training.loop import OnStep
from shoal.adapters.training.method_options import RANKLESS
from shoal.adapters.training.trainer import TrainResult, train
from shoal.adapters.training.world import World

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATS = [
    [("user", "ab"), ("assistant", "xyz")],
    [("user", "c"), ("assistant", "zzyx")],
    [("system", "s"), ("user", "d"), ("assistant", "yy")],
    [("user", "e"), ("assistant", "x"), ("user", "f"), ("assistant", "z")],
    [("user", "g"), ("assistant", "zxzxzx")],
]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Bytes as tokens, and two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate(specials + alphabet)}
    bytes_as_tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_as_tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_as_tokens.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_as_tokens,
        bos_token=specials[0],
        eos_token=specials[1],
        chat_template=CHATML,
    )


@pytest.fixture(scope="session")
def base(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers as a Hugging Face directory."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    directory = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_chats(directory: Path) -> Path:
    """Five chats to memorise."""
    lines = (
        json.dumps({"messages": [{"role": role, "content": text} for role, text in chat]})
        for chat in CHATS
    )
    path = directory / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Five chats to memorise."""
    return write_chats(tmp_path)


@dataclass(frozen=True)
class Lab:
    """Trains on the tiny base."""

    base: Path
    data: Path
    root: Path

    def config(self, name: str, **options: Any) -> TrainConfig:
        """A short LoRA-XS run into the directory ``name``, unless told otherwise."""
        asked: dict[str, Any] = {"method": "lora-xs", "steps": 6, "batch_size": 2}
        if options.get("method") not in RANKLESS:
            asked["rank"] = 4
        paths = {"base": self.base, "data": self.data, "out": self.root / name}
        return TrainConfig(**{**paths, **asked, "device": "cpu", **options})

    def train(
        self,
        name: str,
        on_step: OnStep | None = None,
        world: World | None = None,
        **options: Any,
    ) -> TrainResult:
        """Run it."""
        return train(
            self.config(name, **options),
            cache_dir=self.root / "bases",
            progress=False,
            on_step=on_step,
            world=world,
        )

    def train_lanes(
        self, name: str, lanes: list[Lane], on_step: OnStep | None = None, **options: Any
    ) -> list[TrainResult]:
        """Run several side by side."""
        return train(
            self.config(name, **options),
            lanes=lanes,
            cache_dir=self.root / "bases",
            progress=False,
            on_step=on_step,
        )


@pytest.fixture
def lab(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """Trains on the tiny base; leaves the user's cache alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg-cache"))
    return Lab(base, data, tmp_path)


@pytest.fixture(scope="module")
def module_lab(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """One for all tests of a module."""
    root = tmp_path_factory.mktemp("lab")
    return Lab(base, write_chats(root), root)


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    """Writes a data file of the given lines."""

    def write(*lines: str | bytes) -> Path:
        path = tmp_path / "lines.jsonl"
        raw = [line.encode() if isinstance(line, str) else line for line in lines]
        path.write_bytes(b"\n".join(raw) + b"\n")
        return path

    return write
