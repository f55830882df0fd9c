"""What is compiled before a runner serves."""

import pytest

from shoal.kernels.paged_attention.launches import default_prefill_config, row_class
from shoal.server.model.device_runner import RunnerLimits
from shoal.server.model.starting import prompt_steps


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
