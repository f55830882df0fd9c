"""The decoder against transformers on tiny random models of every architecture, and itself."""

import itertools
import random
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from shoal.adapters.spec import Group, Target
from shoal.kernels.paged_attention.kernel import paged_prefill
from shoal.server.engine.plan import Row
from shoal.server.engine.request import SamplingParams
from shoal.server.model.batch import Batch
from shoal.server.model.config import ModelConfig
from shoal.server.model.decoder import Decoder
from shoal.server.model.fused import FusedForward, StepInputs
from shoal.server.model.kv_cache import KVCache
from shoal.server.model.step_tensors import StepTensors, layout_of

BLOCK = 4
VOCAB = 97
TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4, "head_dim": 8}),
    "llama-mqa": ("Llama", {"num_key_value_heads": 1}),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-yarn-mscale": (
        "Llama",
        {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 8.0}},
    ),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 7, "head_dim": 16}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-tied-bias": ("Qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 20}),
    "gemma2-hot": (
        "Gemma2",
        {
            "head_dim": 16,
            "sliding_window": 6,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 0.5,
        },
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "head_dim": 16,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}


@cache
def hugging_face(case: str) -> Any:
    """The reference model; eager attention, because only that applies Gemma 2's softcap."""
    kind, options = CASES[case]
    config = getattr(transformers, f"{kind}Config")(**TINY | options)
    config._attn_implementation = "eager"
    torch.manual_seed(sorted(CASES).index(case))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        # Large enough that every mistake shows, and biases and norms that are not 0 and 1.
        parameter.data.normal_(0, 0.2).add_(1.0 if "norm" in name and "gemma" not in case else 0.0)
    return model


@cache
def ours(case: str) -> Decoder:
    reference = hugging_face(case)
    decoder = Decoder(ModelConfig.from_hf(reference.config.to_dict()))
    state = reference.state_dict()
    for name in decoder.weight_shapes():
        decoder.load_weight(name, state[name])
    return decoder


def row(ids: Sequence[int], start: int, blocks: Sequence[int]) -> Row:
    return Row(
        request_id="r",
        token_ids=tuple(ids),
        start=start,
        block_ids=tuple(blocks),
        sample=True,
        sampling=SamplingParams(max_tokens=1),
    )


def new_cache(decoder: Decoder, num_blocks: int = 64) -> KVCache:
    return KVCache(
        decoder.config,
        num_blocks=num_blocks,
        block_tokens=BLOCK,
        device="cpu",
        dtype=decoder.dtype,
    )


@torch.inference_mode()
def step(decoder: Decoder, kv: KVCache, rows: Sequence[Row], adapters: Any = None) -> Tensor:
    batch = Batch.from_rows(rows, block_tokens=BLOCK, adapters=adapters)
    return decoder.logits(decoder(batch, kv))


@torch.inference_mode()
def expected(case: str, ids: Sequence[int]) -> Tensor:
    logits: Tensor = hugging_face(case)(torch.tensor([ids])).logits[0]
    return logits


def assert_close(got: Tensor, want: Tensor) -> None:
    spread = float(want.max() - want.min())
    assert spread > 0.1, "the reference says nothing"
    assert float((got - want).abs().max()) <= 1e-4 * spread


def prompt(length: int, seed: int = 0) -> list[int]:
    return [random.Random(seed).randrange(VOCAB) for _ in range(length)]


@pytest.mark.parametrize("case", CASES)
def test_a_whole_prompt_gives_the_logits_of_transformers(case: str) -> None:
    ids = prompt(29)
    decoder = ours(case)
    got = step(decoder, new_cache(decoder), [row(ids, 0, range(8))])
    assert_close(got, expected(case, ids))


@pytest.mark.parametrize("case", CASES)
def test_chunks_and_single_tokens_give_the_logits_of_a_whole_prompt(case: str) -> None:
    ids = prompt(29)
    decoder = ours(case)
    want = expected(case, ids)
    blocks = random.Random(1).sample(range(64), 8)
    for cuts in ([0, 5, 6, 17, 29], [0, 13, *range(14, 30)], list(range(30))):
        kv = new_cache(decoder)
        parts = [step(decoder, kv, [row(ids[a:b], a, blocks)]) for a, b in itertools.pairwise(cuts)]
        assert_close(torch.cat(parts), want)


@pytest.mark.parametrize("case", CASES)
def test_mixed_batches_give_each_sequence_its_own_logits(case: str) -> None:
    """Sequences of very different lengths, in every phase at once, in shuffled blocks."""
    rng = random.Random(5)
    decoder = ours(case)
    kv = new_cache(decoder)
    kv._data.normal_(0, 50.0)  # what earlier requests left behind must not matter
    free = rng.sample(range(64), 64)
    texts = [prompt(n, seed=n) for n in (3, 30, 17, 9, 24, 1)]
    wants = [expected(case, ids) for ids in texts]
    blocks = [[free.pop() for _ in range(-(-len(ids) // BLOCK))] for ids in texts]
    done = [0] * len(texts)
    while any(d < len(ids) for d, ids in zip(done, texts, strict=True)):
        sizes = [
            min(rng.choice((1, 1, 4, 11)), len(t) - d) for t, d in zip(texts, done, strict=True)
        ]
        order = sorted((i for i, n in enumerate(sizes) if n), key=lambda i: sizes[i] > 1)
        rows = [row(texts[i][done[i] : done[i] + sizes[i]], done[i], blocks[i]) for i in order]
        logits = step(decoder, kv, rows)
        for i in order:
            part, logits = logits[: sizes[i]], logits[sizes[i] :]
            assert_close(part, wants[i][done[i] : done[i] + sizes[i]])
            done[i] += sizes[i]


class Recorder:
    """Adds ``x Mᵀ`` with a fixed M per group, and so acts as a change of the weight."""

    def __init__(self, decoder: Decoder) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = decoder.config.base_shape("tiny", "")
        self.deltas = {
            (layer, group): 0.05 * torch.randn(shape.group_dims(group), generator=generator)
            for layer in range(shape.num_layers)
            for group in ("qkv", "o", "gate_up", "down")
        }

    def apply(self, layer: int, group: Group, x: Tensor, y: Tensor) -> None:
        y += x @ self.deltas[layer, group].T


@pytest.mark.parametrize("case", ["llama", "llama-biases", "qwen2", "gemma3"])
def test_adapters_act_like_a_change_of_the_weights(case: str) -> None:
    ids = prompt(12)
    decoder = ours(case)
    recorder = Recorder(decoder)
    got = step(decoder, new_cache(decoder), [row(ids, 0, range(3))], recorder)

    merged = Decoder(decoder.config)
    state = hugging_face(case).state_dict()
    for name in merged.weight_shapes():
        merged.load_weight(name, state[name])
    modules = {"qkv": "q_proj k_proj v_proj", "o": "o_proj", "gate_up": "gate_proj up_proj"}
    for (layer, group), delta in recorder.deltas.items():
        for module in modules.get(group, "down_proj").split():
            weight = merged.weight_of(Target(layer, module))
            weight += delta[: len(weight)]
            delta = delta[len(weight) :]
    want = step(merged, new_cache(merged), [row(ids, 0, range(3))])
    assert_close(got, want)
    assert float((want - expected(case, ids)).abs().max()) > 0.01


@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_weight_of_is_the_checkpoints_weight(case: str) -> None:
    decoder = ours(case)
    state = hugging_face(case).state_dict()
    shape = decoder.config.base_shape("tiny", "")
    for target in shape.targets():
        got = decoder.weight_of(target)
        assert got.shape == shape.dims[target.module]
        names = [n for n in state if f"layers.{target.layer}." in n and f"{target.module}.w" in n]
        torch.testing.assert_close(got, state[names[0]], rtol=0, atol=0)


def test_a_row_that_overflows_leaves_the_rows_after_it_alone() -> None:
    """Blocks are reused without clearing, and masked positions still multiply by zero."""
    decoder = ours("llama")
    kv = new_cache(decoder)

    class Overflow:
        def apply(self, layer: int, group: Group, x: Tensor, y: Tensor) -> None:
            y *= float("inf")  # infinities, and nan where a zero was

    assert not step(decoder, kv, [row(prompt(8), 0, [3, 1])], Overflow()).isfinite().all()
    ids = prompt(5)
    got = [step(decoder, kv, [row(ids[:2], 0, [1, 3])])]
    got += [step(decoder, kv, [row([ids[at]], at, [1, 3])]) for at in (2, 3, 4)]
    assert_close(torch.cat(got), expected("llama", ids))


def test_bfloat16_stays_near_float32() -> None:
    ids = prompt(20)
    exact = ours("gemma3")
    rounded = Decoder(exact.config, dtype=torch.bfloat16)
    state = hugging_face("gemma3").state_dict()
    for name in rounded.weight_shapes():
        rounded.load_weight(name, state[name])
    kv = new_cache(rounded)
    got = step(rounded, kv, [row(ids[:19], 0, range(5))])
    got = torch.cat([got, step(rounded, kv, [row(ids[19:], 19, range(5))])])
    want = expected("gemma3", ids)
    assert got.dtype == torch.float32
    assert float((got - want).abs().mean()) < 0.05 * float(want.std())


class FusedStepper:
    """Feeds rows to a fused forward pass; every row is attended to as a chunk."""

    def __init__(self, case: str) -> None:
        self.decoder = ours(case)
        self.kv: KVCache = new_cache(self.decoder)
        self.kv._data.normal_(0, 50.0)  # what earlier requests left behind must not matter
        self.forward = FusedForward(self.decoder, self.kv, max_positions=256)
        self.tensors = StepTensors(
            max_tokens=128,
            max_rows=8,
            num_lanes=8,
            max_blocks=32,
            block_tokens=BLOCK,
            device=torch.device("cpu"),
        )

    @torch.inference_mode()
    def __call__(self, rows: Sequence[Row]) -> Tensor:
        # Every row as a chunk: also those of one token.
        layout = layout_of(rows)
        self.tensors.load(rows, layout, entropy=random.Random(0), table_blocks=32)
        device = self.tensors.device
        starts = torch.tensor([0, *(len(r.token_ids) for r in rows)]).cumsum(0).int()

        def attend(
            layer: int, q: Tensor, scale: float, window: int | None, softcap: float | None
        ) -> Tensor:
            return paged_prefill(
                q,
                self.kv.keys[layer],
                self.kv.values[layer],
                self.tensors.tables(len(rows), 32),
                device["contexts"][: len(rows)],
                starts,
                scale=scale,
                window=window,
                softcap=softcap,
            ).flatten(1)

        hidden, scale = self.forward(
            StepInputs(
                input_ids=device["ids"][: layout.tokens],
                positions=device["positions"][: layout.tokens],
                slot_mapping=device["slots"][: layout.tokens],
                attend=attend,
            )
        )
        assert (scale is not None) == self.forward.deferred
        return self.decoder.logits(self.forward.normalised(hidden, scale))


@pytest.mark.parametrize("case", CASES)
def test_the_fused_forward_gives_each_sequence_its_own_logits(case: str) -> None:
    rng = random.Random(5)
    step = FusedStepper(case)
    free = rng.sample(range(64), 64)
    texts = [prompt(n, seed=n) for n in (3, 30, 17, 9, 24, 1)]
    wants = [expected(case, ids) for ids in texts]
    blocks = [tuple(free.pop() for _ in range(-(-len(ids) // BLOCK))) for ids in texts]
    done = [0] * len(texts)
    while any(d < len(ids) for d, ids in zip(done, texts, strict=True)):
        sizes = [
            min(rng.choice((1, 1, 4, 11)), len(t) - d) for t, d in zip(texts, done, strict=True)
        ]
        order = sorted((i for i, n in enumerate(sizes) if n), key=lambda i: sizes[i] > 1)
        rows = [
            row(texts[i][done[i] : done[i] + sizes[i]], done[i], blocks[i])._replace(lane=i)
            for i in order
        ]
        logits = step(rows)
        for i in order:
            part, logits = logits[: sizes[i]], logits[sizes[i] :]
            assert_close(part, wants[i][done[i] : done[i] + sizes[i]])
            done[i] += sizes[i]
