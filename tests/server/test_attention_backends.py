"""The triton backend against the torch backend: attention of mixed steps, and a decoder's logits.

On a CPU the kernels run in Triton's interpreter; with SHOAL_TEST_GPU=1 on a GPU, compiled.
"""

import os
import random
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from shoal.kernels import launching
from shoal.server.engine.plan import Row
from shoal.server.engine.request import SamplingParams
from shoal.server.model import attention, attention_xformers
from shoal.server.model.attention import (
    PagedAttention,
    choose_attention,
    torch_attention,
    triton_attention,
)
from shoal.server.model.batch import Batch
from shoal.server.model.config import ModelConfig
from shoal.server.model.decoder import Decoder
from shoal.server.model.kv_cache import KVCache

DEVICE = torch.device("cuda" if "SHOAL_TEST_GPU" in os.environ else "cpu")
BLOCK = 4
HEADS, KV_HEADS, DIM = 6, 2, 8
TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": HEADS * DIM,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
}
GEMMA2 = TINY | {
    "model_type": "gemma2",
    "head_dim": DIM,
    "sliding_window": 6,
    "query_pre_attn_scalar": 10,
    "attn_logit_softcapping": 0.5,
    "final_logit_softcapping": 5.0,
}


def row(name: str, ids: Sequence[int], start: int, blocks: Sequence[int]) -> Row:
    return Row(
        request_id=name,
        token_ids=tuple(ids),
        start=start,
        block_ids=tuple(blocks),
        sample=True,
        sampling=SamplingParams(max_tokens=1),
    )


def new_cache(config: ModelConfig) -> KVCache:
    kv = KVCache(config, num_blocks=40, block_tokens=BLOCK, device=DEVICE, dtype=torch.float32)
    kv._data.normal_(0, 3.0)  # earlier positions, and other sequences' leftovers
    return kv


def mixed_rows(shapes: Sequence[tuple[int, int]]) -> list[Row]:
    """Rows of ``(context, new tokens)`` in shuffled blocks."""
    rng = random.Random(0)
    free = rng.sample(range(40), 40)
    return [
        row(
            str(i),
            [rng.randrange(64) for _ in range(new)],
            context - new,
            [free.pop() for _ in range(-(-context // BLOCK))],
        )
        for i, (context, new) in enumerate(shapes)
    ]


MIXED = [(7, 1), (1, 1), (18, 1), (9, 9), (14, 5), (6, 1)]


@pytest.mark.parametrize(
    "shapes", [MIXED, MIXED[:3], MIXED[3:]], ids=["mixed", "only decode", "only chunks"]
)
@pytest.mark.parametrize(("window", "cap"), [(None, None), (5, None), (16, 1.5)])
def test_triton_attends_like_torch(
    shapes: list[tuple[int, int]], window: int | None, cap: float | None
) -> None:
    config = ModelConfig.from_hf(TINY)
    batch = Batch.from_rows(mixed_rows(shapes), block_tokens=BLOCK, device=DEVICE)
    torch.manual_seed(0)
    tokens = len(batch.input_ids)
    qkv = torch.randn(tokens, HEADS + 2 * KV_HEADS, DIM).to(DEVICE)
    q, k, v = torch.split(qkv, [HEADS, KV_HEADS, KV_HEADS], dim=1)
    kv = new_cache(config)
    for layer in (0, 1):
        want, got = (
            begin(batch, kv)(layer, q, k, v, scale=0.3, window=window, softcap=cap)
            for begin in (torch_attention, triton_attention)
        )
        assert got.shape == (tokens, HEADS * DIM)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", [TINY, GEMMA2], ids=["llama", "gemma2"])
@torch.inference_mode()
def test_a_decoder_has_the_same_logits_with_either_backend(model: dict[str, Any]) -> None:
    config = ModelConfig.from_hf(model)
    decoder = Decoder(config, device=DEVICE)
    torch.manual_seed(1)
    for name, shape in decoder.weight_shapes().items():
        decoder.load_weight(name, torch.randn(shape) * 0.2)
    rng = random.Random(2)
    texts = [[rng.randrange(64) for _ in range(n)] for n in (13, 9, 3)]
    blocks = [[5, 1, 9, 2], [3, 0, 7], [4]]
    # Per step and text, which tokens run: chunks alone, chunks of all, all in decode.
    steps = [[(0, 8), (0, 0), (0, 0)], [(8, 12), (0, 8), (0, 2)], [(12, 13), (8, 9), (2, 3)]]
    got, want = (
        _logits(decoder, begin, texts, blocks, steps)
        for begin in (triton_attention, torch_attention)
    )
    spread = float(want.max() - want.min())
    assert spread > 0.1
    assert float((got - want).abs().max()) <= 1e-4 * spread


def _logits(
    decoder: Decoder,
    begin: attention.BeginAttention,
    texts: list[list[int]],
    blocks: list[list[int]],
    steps: list[list[tuple[int, int]]],
) -> torch.Tensor:
    decoder.begin_attention = begin
    torch.manual_seed(3)
    kv = new_cache(decoder.config)
    logits = []
    for step in steps:
        rows = [row(str(i), texts[i][a:b], a, blocks[i]) for i, (a, b) in enumerate(step) if b > a]
        batch = Batch.from_rows(rows, block_tokens=BLOCK, device=DEVICE)
        logits.append(decoder.logits(decoder(batch, kv)))
    return torch.cat(logits)


def test_rows_a_graph_pads_with_change_nothing() -> None:
    """Static tensors of a larger step: padding rows have context 0, padding chunks no tokens."""
    config = ModelConfig.from_hf(TINY)
    batch = Batch.from_rows(mixed_rows([(7, 1), (9, 4)]), block_tokens=BLOCK, device=DEVICE)
    torch.manual_seed(0)
    qkv = torch.randn(9, HEADS + 2 * KV_HEADS, DIM).to(DEVICE)
    spare = torch.tensor([39 * BLOCK, 39 * BLOCK + 1, 39 * BLOCK + 2, 39 * BLOCK + 3])
    slots = batch.slot_mapping.tolist()
    tables = torch.zeros(5, 8, dtype=torch.int64)
    tables[0, : batch.block_tables.shape[1]] = batch.block_tables[0]
    tables[3, : batch.block_tables.shape[1]] = batch.block_tables[1]
    kv = new_cache(config)
    padded = PagedAttention(
        kv,
        # One decode row and two padding ones; four tokens of a chunk, and two of padding.
        slot_mapping=torch.tensor([slots[0], *spare[:2], *slots[1:], *spare[2:]], device=DEVICE),
        block_tables=tables.to(DEVICE),
        context_lens=torch.tensor([7, 0, 0, 9, 0], dtype=torch.int32, device=DEVICE),
        query_starts=torch.tensor([0, 4, 4], dtype=torch.int32, device=DEVICE),
        num_decode_rows=3,
    )
    options: dict[str, Any] = {"scale": 0.3, "window": None, "softcap": None}
    q, k, v = torch.split(qkv, [HEADS, KV_HEADS, KV_HEADS], dim=1)
    got = padded(0, q, k, v, **options)
    used = torch.tensor([0, 3, 4, 5, 6], device=DEVICE)
    want = torch_attention(batch, kv)(0, q[used], k[used], v[used], **options)
    torch.testing.assert_close(got[used], want, rtol=1e-5, atol=1e-5)
    assert not got[1:3].any()


def test_auto_is_torch_on_a_cpu_and_triton_on_a_gpu() -> None:
    assert choose_attention("auto", torch.device("cpu")) is torch_attention
    assert choose_attention("auto", torch.device("cuda")) is triton_attention
    assert choose_attention("triton", torch.device("cuda")) is triton_attention
    assert choose_attention("torch", torch.device("cuda")) is torch_attention


def test_a_backend_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'xformers': must be torch or auto on a CPU"):
        choose_attention("xformers", torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "xformers", None)  # an import of it fails
    attention_xformers.load_xformers.cache_clear()
    monkeypatch.setattr(attention_xformers, "version", lambda _: "3.6.0")
    with pytest.raises(ValueError, match=r"'xformers': .*pip install 'shoal\[xformers\]'"):
        choose_attention("xformers", torch.device("cuda"))
    monkeypatch.setattr(attention_xformers, "version", lambda _: "3.9.0")
    with pytest.raises(ValueError, match=r"block pointers, .* the version here is 3\.9\.0"):
        choose_attention("xformers", torch.device("cuda"))
    monkeypatch.setattr(launching, "interpreting", lambda: False)
    with pytest.raises(ValueError, match="'triton': must be torch or auto on a CPU"):
        choose_attention("triton", torch.device("cpu"))
