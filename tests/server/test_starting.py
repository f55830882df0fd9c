"""What is compiled before a runner serves."""

import pytest
import torch

from shoal.kernels.add_residual import kernel as add_residual
from shoal.kernels.core_apply.epilogue import CoreEpilogue, CoreRows, MixedEpilogue
from shoal.kernels.paged_attention.launches import default_prefill_config, row_class
from shoal.kernels.rope_kv import kernel as rope_kv
from shoal.kernels.silu_mul import kernel as silu_mul
from shoal.server.model.device_runner import RunnerLimits
from shoal.server.model.fused import INLINE_TOKENS_MAX
from shoal.server.model.starting import BESIDE_ROWS, WARM_TOKENS, prompt_steps


@pytest.mark.parametrize(
    ("rows", "tokens"), [(1, 64), (20, 48), (32, 8192), (256, 8192), (300, 2048)]
)
@pytest.mark.parametrize("group", [1, 4, 8])
def test_no_prompt_step_compiles_prefill_anew(rows: int, tokens: int, group: int) -> None:
    def variant(chunks: int, count: int) -> tuple[object, ...]:
        return row_class(chunks), default_prefill_config(count, chunks, group, 128, 2)

    limits = RunnerLimits(max_num_seqs=rows, max_num_batched_tokens=tokens, max_model_len=4096)
    warmed = {variant(*step) for step in prompt_steps(limits)}
    for chunks in range(1, rows + 1):
        for count in {2 * chunks, 16 * chunks, 17 * chunks, 100 * chunks, tokens}:
            if 2 * chunks <= count <= tokens:
                assert variant(chunks, count) in warmed, (chunks, count)


def test_no_number_of_tokens_compiles_fused_kernels_anew() -> None:
    nothing = torch.empty(0)
    indices = torch.empty(0, dtype=torch.int32)
    rows = CoreRows(nothing, indices.long(), indices, indices, columns=16)
    inline = CoreEpilogue(rows, nothing, h_column=0, matrix=0)
    mixed = MixedEpilogue(torch.empty(1, 0, 3, 16), nothing)

    def variants(tokens: int) -> tuple[object, ...]:
        core = inline if tokens <= INLINE_TOKENS_MAX else mixed
        beside = mixed if tokens <= BESIDE_ROWS else core
        return (
            rope_kv.default_config(core, tokens),
            add_residual.default_config(tokens, 4096, core),
            silu_mul.default_config(core, tokens),
            silu_mul.default_config(beside, tokens),
        )

    warmed = [set(each) for each in zip(*map(variants, WARM_TOKENS), strict=True)]
    for tokens in range(1, 2 * max(WARM_TOKENS)):
        for one, known in zip(variants(tokens), warmed, strict=True):
            assert one in known, tokens
