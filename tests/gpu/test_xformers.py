"""The xformers backend with xformers itself, on the card, against plain torch in float32."""

import random
from typing import Any

import pytest
import torch

from shoal.server.engine.plan import Row
from shoal.server.engine.request import SamplingParams
from shoal.server.model.attention import torch_attention
from shoal.server.model.attention_xformers import (
    XformersAttention,
    XformersUnusable,
    load_xformers,
)
from shoal.server.model.batch import Batch
from shoal.server.model.config import ModelConfig
from shoal.server.model.kv_cache import KVCache

BLOCK, BLOCKS = 64, 40
HEADS, KV_HEADS, DIM = 32, 8, 128
CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": HEADS * DIM,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM,
}
# (context, new tokens)
DECODE = [(70, 1), (1, 1), (64, 1), (513, 1)]
CHUNKS = [(9, 9), (140, 5), (300, 77)]


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


@pytest.mark.parametrize(
    "shapes", [DECODE + CHUNKS, DECODE, CHUNKS], ids=["mixed", "decode", "new"]
)
@pytest.mark.parametrize("window", [None, 100])
def test_it_attends_like_torch(shapes: list[tuple[int, int]], window: int | None) -> None:
    try:
        load_xformers()
    except XformersUnusable as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    rows = rows_of(shapes)
    qkv = torch.randn(sum(new for _, new in shapes), HEADS + 2 * KV_HEADS, DIM).bfloat16()
    data = None
    got: dict[str, Any] = {}
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        kv = KVCache(
            ModelConfig.from_hf(CONFIG),
            num_blocks=BLOCKS,
            block_tokens=BLOCK,
            device=device,
            dtype=dtype,
        )
        data = torch.randn_like(kv._data).bfloat16() if data is None else data
        kv._data.copy_(data)
        batch = Batch.from_rows(rows, block_tokens=BLOCK, device=device)
        q, k, v = torch.split(qkv.to(device, dtype), [HEADS, KV_HEADS, KV_HEADS], dim=1)
        if device == "cpu":
            step = torch_attention(batch, kv)
            out = step(0, q, k, v, scale=DIM**-0.5, window=window, softcap=None)
        else:
            kv.write(0, batch.slot_mapping, k, v)
            attend = XformersAttention(
                kv,
                block_tables=batch.block_tables,
                query_lens=batch.query_lens,
                context_lens=batch.context_lens,
                num_decode_rows=batch.num_decode_rows,
            )
            out = attend(0, q, DIM**-0.5, window, None)
        got[device] = out.float().cpu()
    torch.testing.assert_close(got["cuda"], got["cpu"], rtol=2e-2, atol=1e-2)
