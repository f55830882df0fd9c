"""The shapes benchmarks run at, by the name of the model they come from."""

from __future__ import annotations

from typing import NamedTuple


class ModelShape(NamedTuple):
    """Widths of a decoder: of the residual stream, of q, of k and v each, of the feed-forward."""

    layers: int
    hidden: int
    q: int
    kv: int
    ffn: int


LLAMA_3_1_8B = ModelShape(layers=32, hidden=4096, q=4096, kv=1024, ffn=14336)
SMOLLM2_135M = ModelShape(layers=30, hidden=576, q=576, kv=192, ffn=1536)

DECODE_TOKENS = (1, 16, 32, 64, 128, 256)
PROMPT_TOKENS = 2048
