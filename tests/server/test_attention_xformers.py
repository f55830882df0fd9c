"""The xformers backend around a stand-in for xformers: which keys, masks and shapes it is given."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.server.engine.plan import Row
from shoal.server.engine.request import SamplingParams
from shoal.server.model import attention_xformers
from shoal.server.model.attention import torch_attention
from shoal.server.model.attention_xformers import XformersAttention, check_model
from shoal.server.model.batch import Batch
from shoal.server.model.config import ModelConfig
from shoal.server.model.kv_cache import KVCache

BLOCK, BLOCKS = 64, 12
HEADS, KV_HEADS, DIM = 6, 2, 16
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": HEADS * DIM,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
}
GEMMA2 = LLAMA | {
    "model_type": "gemma2",
    "head_dim": DIM,
    "sliding_window": 6,
    "query_pre_attn_scalar": 10,
    "attn_logit_softcapping": 0.5,
}


class Mask:
    """Lengths as xformers' masks take them; bottom-right causal, or for one query a row."""

    def __init__(self, queries: list[int], contexts: list[int], window: int | None = None) -> None:
        self.queries, self.contexts, self.window = queries, contexts, window

    @classmethod
    def from_seqlens(cls, queries: list[int], contexts: list[int], device: Any) -> "Mask":
        return cls(queries, contexts)

    def make_local_attention_from_bottomright(self, window: int) -> "Mask":
        return Mask(self.queries, self.contexts, window)


class PagedMask(Mask):
    tables: Tensor
    page: int

    @classmethod
    def from_seqlens(  # type: ignore[override]
        cls, *, q_seqlen: Any, kv_seqlen: Any, block_tables: Tensor, page_size: int, device: Any
    ) -> "PagedMask":
        assert block_tables.dtype == torch.int32
        assert len(q_seqlen) == len(kv_seqlen) == len(block_tables)
        mask = cls(q_seqlen, kv_seqlen)
        mask.tables, mask.page = block_tables, page_size
        return mask


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Mask, scale: float, op: Any) -> Tensor:
    """What xformers computes: q, k and v are (1, n, groups, heads, d)."""
    assert (op == "splitk") == isinstance(bias, PagedMask)
    assert q.shape[2:] == k.shape[2:] == v.shape[2:]
    out, q_at, k_at = torch.empty_like(q), 0, 0
    for row, (n, context) in enumerate(zip(bias.queries, bias.contexts, strict=True)):
        if isinstance(bias, PagedMask):
            blocks = bias.tables[row, : -(-context // bias.page)].tolist()
            slots = [b * bias.page + i for b in blocks for i in range(bias.page)][:context]
        else:
            slots = list(range(k_at, k_at + context))
        keys, values = k[0, slots], v[0, slots]  # (context, groups, heads, d)
        queries = q[0, q_at : q_at + n]
        scores = torch.einsum("qghd,kghd->ghqk", queries, keys) * scale
        at = torch.arange(context - n, context)[:, None]
        key = torch.arange(context)
        seen = (key <= at) if bias.window is None else (key <= at) & (key > at - bias.window)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out[0, q_at : q_at + n] = torch.einsum("ghqk,kghd->qghd", weights, values)
        q_at, k_at = q_at + n, k_at + context
    assert q_at == q.shape[1]
    return out


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    biases = SimpleNamespace(
        PagedBlockDiagonalPaddedKeysMask=PagedMask, BlockDiagonalCausalFromBottomRightMask=Mask
    )
    module = SimpleNamespace(
        attn_bias=biases,
        triton_splitk=SimpleNamespace(FwOp="splitk"),
        memory_efficient_attention_forward=forward,
    )
    monkeypatch.setattr(attention_xformers, "load_xformers", lambda: module)


def rows_of(shapes: list[tuple[int, int]]) -> list[Row]:
    rng = random.Random(0)
    free = rng.sample(range(BLOCKS), BLOCKS)
    return [
        Row(
            request_id=str(i),
            token_ids=tuple(rng.randrange(64) for _ in range(new)),
            start=context - new,
            block_ids=tuple(free.pop() for _ in range(-(-context // BLOCK))),
            sample=True,
            sampling=SamplingParams(max_tokens=1),
        )
        for i, (context, new) in enumerate(shapes)
    ]


MIXED = [(70, 1), (1, 1), (64, 1), (9, 9), (140, 5), (66, 1)]


@pytest.mark.parametrize(
    "shapes", [MIXED, MIXED[:3], MIXED[3:]], ids=["mixed", "only decode", "only chunks"]
)
@pytest.mark.parametrize("window", [None, 5, 100])
def test_it_attends_like_torch(shapes: list[tuple[int, int]], window: int | None) -> None:
    config = ModelConfig.from_hf(LLAMA)
    batch = Batch.from_rows(rows_of(shapes), block_tokens=BLOCK)
    kv = KVCache(config, num_blocks=BLOCKS, block_tokens=BLOCK, device="cpu", dtype=torch.float32)
    kv._data.normal_(0, 3.0)
    torch.manual_seed(0)
    qkv = torch.randn(len(batch.input_ids), HEADS + 2 * KV_HEADS, DIM)
    q, k, v = torch.split(qkv, [HEADS, KV_HEADS, KV_HEADS], dim=1)
    step = XformersAttention(
        kv,
        block_tables=batch.block_tables,
        query_lens=batch.query_lens,
        context_lens=batch.context_lens,
        num_decode_rows=batch.num_decode_rows,
    )
    for layer in (0, 1):
        options: dict[str, Any] = {"scale": 0.3, "window": window, "softcap": None}
        want = torch_attention(batch, kv)(layer, q, k, v, **options)  # writes k and v, too
        torch.testing.assert_close(step(layer, q, **options), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "dtype", "words"),
    [
        (LLAMA, torch.float32, "float32"),
        (LLAMA | {"head_dim": 20}, torch.bfloat16, "heads of 20"),
        (GEMMA2, torch.bfloat16, "capped"),
    ],
)
def test_models_it_cannot_serve_are_refused(
    model: dict[str, Any], dtype: torch.dtype, words: str
) -> None:
    with pytest.raises(ValueError, match=f"--attention is 'xformers'.*{words}"):
        check_model(ModelConfig.from_hf(model), dtype)


def test_a_model_it_can_serve_is_not_refused() -> None:
    check_model(ModelConfig.from_hf(LLAMA), torch.float16)
