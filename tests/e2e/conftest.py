"""A tiny random Llama on disk, adapters written without any of our code, and naive generation."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HIDDEN, FFN, LAYERS, EOS = 48, 80, 2, 1
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Adapter:
    """Files of an adapter, and what it adds to each weight, in float64."""

    files: dict[str, Path]
    deltas: Mapping[str, Tensor]


class TinyBase:
    """The base as transformers sees it: the oracle."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def weight(self, module: str) -> Tensor:
        return self.model.get_submodule(module).weight.detach().double()

    def modules(self) -> list[str]:
        return [
            f"model.layers.{layer}.{block}.{name}_proj"
            for layer in range(LAYERS)
            for block, names in {"self_attn": "qkvo", "mlp": ("gate", "up", "down")}.items()
            for name in names
        ]

    def merged(self, deltas: Mapping[str, Tensor]) -> LlamaForCausalLM:
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for module, delta in deltas.items():
                weight = model.get_submodule(module).weight
                weight.copy_((weight.double() + delta).float())
        return model

    @torch.inference_mode()
    def greedy(
        self, prompt: Sequence[int], tokens: int, deltas: Mapping[str, Tensor] | None = None
    ) -> list[int]:
        """Naive generation: merged weights, no cache, one sequence, past the end of sequence."""
        model = self.merged(deltas) if deltas else self.model
        ids = list(prompt)
        for _ in range(tokens):
            logits = model(torch.tensor([ids])).logits
            ids.append(int(logits[0, -1].argmax()))
        return ids[len(prompt) :]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyBase:
    path = tmp_path_factory.mktemp("tiny-llama")
    vocab = {"<unk>": 0, "<eos>": EOS}
    for piece in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)
    torch.manual_seed(11)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(vocab),
        max_position_embeddings=256,
        eos_token_id=EOS,
        bos_token_id=None,
        initializer_range=0.25,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return TinyBase(path)


@pytest.fixture(scope="session")
def make_adapter(
    tiny: TinyBase, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Adapter]:
    """``make_adapter("lora_xs" | "foreign_xs" | "miss" | "mini" | "lora", rank, seed)``."""

    def make(kind: str, rank: int, seed: int, strength: float = 0.5) -> Adapter:
        rng = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng)

        tensors: dict[str, Tensor] = {}
        deltas: dict[str, Tensor] = {}
        config: dict[str, object] = {"r": rank, "bias": "none", "inference_mode": True}
        for module in tiny.modules():
            weight = tiny.weight(module)
            key = f"base_model.model.{module}"
            parts, deltas[module] = _one(kind, weight, rank, noise, strength)
            tensors |= {key + suffix: part for suffix, part in parts.items()}
        if kind in ("miss", "mini"):
            config |= {"peft_type": "MISS", "init_weights": "mini" if kind == "mini" else True}
            config |= {"mini_r": 2 if kind == "mini" else 1}
        else:
            config |= {"peft_type": "LORA", "lora_alpha": 2 * rank, "init_lora_weights": True}
        config["target_modules"] = sorted({m.rsplit(".", 1)[1] for m in tiny.modules()})
        folder = tmp_path_factory.mktemp(kind)
        (folder / "adapter_config.json").write_text(json.dumps(config, sort_keys=True, indent=2))
        tensors = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        return Adapter({path.name: path for path in folder.iterdir()}, deltas)

    return make


def _one(
    kind: str, weight: Tensor, rank: int, noise: Callable[..., Tensor], strength: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors and float64 delta of one module; the scale of the LoRA kinds is 2 (alpha = 2 r)."""
    d_out, d_in = weight.shape
    if kind in ("lora_xs", "foreign_xs"):
        u, _, _ = torch.linalg.svd(weight)
        # A basis that is not the top singular one spans something of its own.
        b = (u[:, :rank] if kind == "lora_xs" else u[:, -rank:]).float()
        a = (b.double().T @ weight).float()
        r = strength * noise(rank, rank) / rank**0.5
        parts = {".lora_A.weight": a, ".lora_B.weight": b}
        parts[".default_lora_latent_mapping.weight"] = r
        return parts, 2.0 * b.double() @ r.double() @ a.double()
    if kind in ("miss", "mini"):
        d = 0.1 * strength * noise(rank, 2 if kind == "mini" else d_out)
        full = d.repeat(1, d_out // 2) if kind == "mini" else d
        return {".miss_block": d}, full.double()[torch.arange(d_in) % rank].T
    a, b = noise(rank, d_in) / d_in**0.5, 0.3 * strength * noise(d_out, rank)
    return {".lora_A.weight": a, ".lora_B.weight": b}, 2.0 * b.double() @ a.double()
