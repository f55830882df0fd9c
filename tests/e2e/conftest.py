"""Tiny random models on disk, adapters written without any of our code, and naive generation."""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.e2e.crash_server import forge
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from shoal.kernels.paged_attention.kernel import paged_prefill
from shoal.server.model.kv_cache import KVCache

__all__ = ["forge"]

HIDDEN, FFN, LAYERS, EOS = 48, 80, 2, 1
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# What makes each family different from Llama where an adapter acts.
ARCHITECTURES: dict[str, dict[str, object]] = {
    "llama": {"tie_word_embeddings": False},
    "tied_llama": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"sliding_window": 11, "head_dim": 16},  # q is wider than the hidden size
    "qwen2": {"use_sliding_window": False},  # biases on q, k and v
    "qwen3": {"head_dim": 16},  # norms on q and k
    "gemma2": {
        "tie_word_embeddings": False,
        "head_dim": 16,
        "sliding_window": 9,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 8.0,
    },
    "gemma3_text": {
        "tie_word_embeddings": False,
        "head_dim": 16,
        "sliding_window": 9,
        "query_pre_attn_scalar": 16,
    },
}
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
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def weight(self, module: str) -> Tensor:
        return self.model.get_submodule(module).weight.detach().double()

    def modules(self) -> list[str]:
        return [
            f"model.layers.{layer}.{block}.{name}_proj"
            for layer in range(LAYERS)
            for block, names in {"self_attn": "qkvo", "mlp": ("gate", "up", "down")}.items()
            for name in names
        ]

    def merged(self, deltas: Mapping[str, Tensor]) -> PreTrainedModel:
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


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No basis that another test, or yesterday's code, has computed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(params=["plain", "fused", "fused, attention by lengths"])
def any_runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner of a CPU, or that of a GPU with its kernels' references, with either attention."""
    monkeypatch.setattr("shoal.server.assemble.runs_fused", lambda *_: request.param != "plain")
    if request.param == "fused, attention by lengths":
        monkeypatch.setattr("shoal.server.assemble.resolve_attention", lambda *_: "xformers")
        monkeypatch.setattr("shoal.server.assemble.check_model", lambda *_: None)
        monkeypatch.setattr("shoal.server.assemble.XformersAttention", AttentionByLengths)


class AttentionByLengths:
    """A backend that, like xformers', is given a step's lengths on the host."""

    def __init__(
        self,
        kv: KVCache,
        *,
        block_tables: Tensor,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        num_decode_rows: int,
    ) -> None:
        assert all(length == 1 for length in query_lens[:num_decode_rows])
        self._kv, self._tables = kv, block_tables
        device = block_tables.device
        self._contexts = torch.tensor(context_lens, dtype=torch.int32, device=device)
        starts = [0, *accumulate(query_lens)]
        self._starts = torch.tensor(starts, dtype=torch.int32, device=device)

    def __call__(
        self, layer: int, q: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        return paged_prefill(
            q,
            self._kv.keys[layer],
            self._kv.values[layer],
            self._tables,
            self._contexts,
            self._starts,
            scale=scale,
            window=window,
            softcap=softcap,
        ).flatten(1)


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyBase]:
    """``make_base(architecture)``: one of ``ARCHITECTURES``.

    Options: ``dtype`` (of the checkpoint), and fields of its config.
    """

    def make(name: str, dtype: torch.dtype = torch.float32, **change: object) -> TinyBase:
        path = tmp_path_factory.mktemp(f"tiny-{name}")
        vocab = {"<unk>": 0, "<eos>": EOS}
        for piece in sorted(pre_tokenizers.ByteLevel.alphabet()):
            vocab[piece] = len(vocab)
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>"
        )
        fast.chat_template = CHAT_TEMPLATE
        fast.save_pretrained(path)
        torch.manual_seed(11)
        fields = {
            "model_type": name,
            "hidden_size": HIDDEN,
            "intermediate_size": FFN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(vocab),
            "max_position_embeddings": 256,
            "eos_token_id": EOS,
            "bos_token_id": None,
            "pad_token_id": None,
            "initializer_range": 0.25,
        }
        fields |= ARCHITECTURES[name] | change
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
        with torch.no_grad():  # as in a trained model: they start at zero, and at one
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("_proj.bias"):
                    parameter.normal_()
                elif "norm" in parameter_name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        model.to(dtype).save_pretrained(path)
        return TinyBase(path)

    return make


@pytest.fixture(scope="session")
def tiny(make_base: Callable[..., TinyBase]) -> TinyBase:
    return make_base("llama")


@pytest.fixture(scope="session")
def make_adapter(
    tiny: TinyBase, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Adapter]:
    """``make_adapter(kind, rank, seed)``; the kinds are in ``_one``.

    Options: ``base``, ``modules`` (a predicate on paths: which ones are adapted), ``dtype`` (of
    the file), ``strength``, ``config`` (more fields), ``scale`` (what those fields make of ``s``).
    """

    def make(
        kind: str,
        rank: int,
        seed: int,
        *,
        base: TinyBase = tiny,
        modules: Callable[[str], bool] = lambda module: True,
        dtype: torch.dtype = torch.float32,
        strength: float = 0.5,
        config: Mapping[str, object] = {},
        scale: float = 2.0,
    ) -> Adapter:
        rng = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng)

        tensors: dict[str, Tensor] = {}
        deltas: dict[str, Tensor] = {}
        for module in filter(modules, base.modules()):
            weight = base.weight(module)
            key = f"base_model.model.{module}"
            parts = _one(kind, module, weight, rank, noise, strength)
            stored = {
                name: part.to(dtype) if part.is_floating_point() else part
                for name, part in parts.items()
            }
            # Of what the file holds, rounding included.
            deltas[module] = _delta(kind, module, weight, stored, scale)
            tensors |= {key + suffix: part.contiguous() for suffix, part in stored.items()}
        adapted = sorted({m.rsplit(".", 1)[1] for m in deltas})
        fields = _config(kind, rank) | {"target_modules": adapted} | dict(config)
        folder = tmp_path_factory.mktemp(kind)
        (folder / "adapter_config.json").write_text(json.dumps(fields, sort_keys=True, indent=2))
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        return Adapter({path.name: path for path in folder.iterdir()}, deltas)

    return make


def _config(kind: str, rank: int) -> dict[str, object]:
    """The scale of LoRA and LoRA-XS is 2 (alpha = 2 r), of the others 1."""
    config: dict[str, object] = {"r": rank, "bias": "none", "inference_mode": True}
    if kind.startswith("svf"):
        return config | {"peft_type": kind.removesuffix("_kept").upper()}
    if kind in ("miss", "mini"):
        mini = kind == "mini"
        return config | {
            "peft_type": "MISS",
            "init_weights": "mini" if mini else True,
            "mini_r": 2 if mini else 1,
        }
    config |= {"lora_alpha": 2 * rank}
    if kind == "compact_xs":
        basis = {"id": "0" * 64, "base_digest": "0" * 64, "rank": rank}
        return config | {"peft_type": "LORA_XS", "basis": basis}
    return config | {"peft_type": "LORA", "init_lora_weights": True}


def _one(
    kind: str,
    module: str,
    weight: Tensor,
    rank: int,
    noise: Callable[..., Tensor],
    strength: float,
) -> dict[str, Tensor]:
    """The tensors of one module, in float32."""
    d_out, d_in = weight.shape
    if kind.endswith("_xs"):
        rank = min(rank, d_out, d_in)
        b = torch.linalg.svd(weight, full_matrices=False).U[:, :rank]
        if kind == "foreign_xs":  # not the top singular basis: it spans something of its own
            b = torch.linalg.qr(noise(d_out, rank).double()).Q
        elif kind == "rotated_xs":
            b = b @ torch.linalg.qr(noise(rank, rank).double()).Q
        r = strength * noise(rank, rank) / rank**0.5
        if kind == "compact_xs":
            b = _signed(b, module)
            probe = b.T @ _seeded("probe", module, d_out, 4)
            return {".lora_latent_mapping.weight": r, ".basis_probe": probe.float()}
        a = b.float().double().T @ weight
        if kind == "odd_xs":  # like LoRA-SB: A is not what B and W make it
            a = a + 0.3 * noise(rank, d_in) / d_in**0.5
        parts = {".lora_A.weight": a.float(), ".lora_B.weight": b.float()}
        return parts | {".default_lora_latent_mapping.weight": r}
    if kind == "svf":
        sigma = torch.linalg.svdvals(weight)
        probe = sigma @ _seeded("sigma", module, len(sigma), 4)
        return {".svf_vector": 4 * strength * noise(len(sigma)), ".svd_probe": probe.float()}
    if kind == "svft_kept":  # the `rank` leading components of W, on a diagonal, and no others
        u, sigma, _ = torch.linalg.svd(weight, full_matrices=False)
        probe = _signed(u, module).T @ _seeded("probe", module, d_out, 4)
        return {
            ".svft_rows": torch.arange(rank, dtype=torch.int32),
            ".svft_cols": torch.arange(rank, dtype=torch.int32),
            ".svft_values": strength * sigma[:rank].float() * noise(rank),
            ".svft_s_pre": sigma[:rank].float(),
            ".svd_probe": probe.float(),
        }
    if kind == "svft":  # `rank` entries a component, anywhere, some of them twice
        u, sigma, _ = torch.linalg.svd(weight, full_matrices=False)
        k = len(sigma)
        places = (noise(2, rank * k).abs() * k).long() % k
        probe = _signed(u, module).T @ _seeded("probe", module, d_out, 4)
        return {
            ".svft_rows": places[0].int(),
            ".svft_cols": places[1].int(),
            ".svft_values": 0.6 * strength * sigma.mean().float() * noise(rank * k) / rank**0.5,
            ".svft_gate": noise(1),
            ".svd_probe": probe.float(),
        }
    if kind in ("miss", "mini"):
        return {".miss_block": 0.1 * strength * noise(rank, 2 if kind == "mini" else d_out)}
    a, b = noise(rank, d_in) / d_in**0.5, 0.3 * strength * noise(d_out, rank)
    return {".lora_A.weight": a, ".lora_B.weight": b}


def _delta(
    kind: str, module: str, weight: Tensor, parts: Mapping[str, Tensor], scale: float
) -> Tensor:
    """What these tensors add to the weight, in float64."""
    d_out, d_in = weight.shape
    if kind in ("miss", "mini"):
        d = parts[".miss_block"].double()
        return d.repeat(1, d_out // d.shape[1])[torch.arange(d_in) % d.shape[0]].T
    if kind == "svf":
        u, sigma, vt = torch.linalg.svd(weight, full_matrices=False)
        kept = sigma * torch.sigmoid(parts[".svf_vector"]).double()
        return u * kept @ vt * (sigma.sum() / kept.sum()) - weight
    if kind == "svft_kept":
        u, _, vt = torch.linalg.svd(weight, full_matrices=False)
        kept = (parts[".svft_s_pre"].double() + parts[".svft_values"].double())[:, None]
        return u[:, : len(kept)] @ (kept * vt[: len(kept)]) - weight
    if kind == "svft":
        u, sigma, _ = torch.linalg.svd(weight, full_matrices=False)
        u = _signed(u, module)
        m = torch.zeros(len(sigma), len(sigma), dtype=torch.float64)
        places = (parts[".svft_rows"].long(), parts[".svft_cols"].long())
        m.index_put_(places, parts[".svft_values"].double(), accumulate=True)
        # V from W and U, as W V = U Σ.
        vt = (u / sigma).T @ weight
        return torch.sigmoid(parts[".svft_gate"].double()) * u @ m @ vt
    if kind == "compact_xs":
        r = parts[".lora_latent_mapping.weight"].double()
        u = torch.linalg.svd(weight, full_matrices=False).U
        b = _signed(u[:, : r.shape[0]], module)
        return scale * b @ r @ b.T @ weight
    a, b = parts[".lora_A.weight"].double(), parts[".lora_B.weight"].double()
    if kind == "lora":
        return scale * b @ a
    return scale * b @ parts[".default_lora_latent_mapping.weight"].double() @ a


def _signed(b: Tensor, module: str) -> Tensor:
    """The documented signs of the canonical basis: a positive product with a seeded vector."""
    return b * torch.sign(_seeded("sign", module, b.shape[0], 1).T @ b)


def _seeded(purpose: str, module: str, rows: int, columns: int) -> Tensor:
    """The documented pseudo-random columns: SHAKE-256 of purpose, layer, module and column."""
    parts = module.split(".")
    drawn = []
    for column in range(columns):
        seed = f"shoal:{purpose}:1:{parts[2]}:{parts[4]}:{column}".encode()
        data = hashlib.shake_256(seed).digest(4 * rows)
        words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, 4 * rows, 4)]
        drawn.append([(word + 0.5) / 2**31 - 1 for word in words])
    return torch.tensor(drawn, dtype=torch.float64).T
