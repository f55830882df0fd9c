"""The torch attention backend against attention written out position by position."""

import random

import pytest
import torch
from torch import Tensor

from shoal.server.engine.plan import Row
from shoal.server.engine.request import SamplingParams
from shoal.server.model import attention
from shoal.server.model.attention import torch_attention
from shoal.server.model.batch import Batch
from shoal.server.model.config import ModelConfig
from shoal.server.model.kv_cache import KVCache

BLOCK = 4
HEADS, KV_HEADS, DIM = 6, 2, 8
CONFIG = ModelConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": 8,
        "hidden_size": HEADS * DIM,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
    }
)


def naive(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, cap: float | None
) -> Tensor:
    """The last ``len(q)`` positions of one sequence over all of it, in float64."""
    start = len(k) - len(q)
    out = torch.zeros(len(q), HEADS, DIM, dtype=torch.float64)
    for i in range(len(q)):
        begin = max(0, start + i + 1 - window) if window else 0
        for head in range(HEADS):
            keys = k[begin : start + i + 1, head // (HEADS // KV_HEADS)].double()
            values = v[begin : start + i + 1, head // (HEADS // KV_HEADS)].double()
            scores = keys @ q[i, head].double() * scale
            if cap is not None:
                scores = torch.tanh(scores / cap) * cap
            out[i, head] = scores.softmax(0) @ values
    return out.flatten(1)


@pytest.mark.parametrize("gather", [1, 300, 1 << 20])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 5, 16])
def test_mixed_rows_equal_attention_written_out(
    window: int | None, cap: float | None, gather: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "GATHER_ELEMENTS", gather)
    rng = random.Random(f"{window} {cap} {gather}")
    torch.manual_seed(0)
    shapes = [(n, 1) for n in (7, 1, 30, 16, 17, 4)] + [(9, 9), (22, 5), (6, 1), (12, 12)]
    free = rng.sample(range(60), 60)
    kv = KVCache(CONFIG, num_blocks=60, block_tokens=BLOCK, device="cpu", dtype=torch.float32)
    kv._data.normal_(0, 30.0)  # other sequences' leftovers
    rows, wants, parts = [], [], []
    for context, new in shapes:
        blocks = tuple(free.pop() for _ in range(-(-context // BLOCK)))
        k, v = torch.randn(context, KV_HEADS, DIM), torch.randn(context, KV_HEADS, DIM)
        q = torch.randn(new, HEADS, DIM)
        old = torch.tensor([blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(context - new)])
        kv.write(1, old.long(), k[: context - new], v[: context - new])
        rows.append(
            Row(
                request_id=str(len(rows)),
                token_ids=(0,) * new,
                start=context - new,
                block_ids=blocks,
                sample=True,
                sampling=SamplingParams(max_tokens=1),
            )
        )
        wants.append(naive(q, k, v, 0.3, window, cap))
        parts.append((q, k[context - new :], v[context - new :]))
    batch = Batch.from_rows(rows, block_tokens=BLOCK)
    assert batch.num_decode_rows == 6
    q, k, v = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    got = torch_attention(batch, kv)(1, q, k, v, scale=0.3, window=window, softcap=cap)
    torch.testing.assert_close(got.double(), torch.cat(wants), rtol=1e-5, atol=1e-5)


def test_block_bytes_counts_what_the_cache_holds() -> None:
    kv = KVCache(CONFIG, num_blocks=3, block_tokens=BLOCK, device="cpu", dtype=torch.bfloat16)
    per_block = KVCache.block_bytes(CONFIG, block_tokens=BLOCK, dtype=torch.bfloat16)
    assert 3 * per_block == kv._data.nbytes


def test_a_row_without_room_for_its_tokens_is_our_bug() -> None:
    row = Row(
        request_id="tight",
        token_ids=(1, 2),
        start=3,
        block_ids=(0,),
        sample=True,
        sampling=SamplingParams(max_tokens=1),
    )
    with pytest.raises(AssertionError, match="tight"):
        Batch.from_rows([row], block_tokens=BLOCK)
