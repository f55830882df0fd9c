"""What is built for a server is wired together."""

from types import SimpleNamespace
from typing import Any

from shoal.server.assemble import Parts
from shoal.server.config import ServeConfig


def test_the_scheduler_knows_which_steps_the_runner_replays() -> None:
    parts: dict[str, Any] = {
        "config": ServeConfig(),
        "plan": SimpleNamespace(block_tokens=16, num_blocks=100, max_model_len=50),
        "decoder": SimpleNamespace(
            config=SimpleNamespace(vocab_size=9, eos_token_ids=frozenset({1}))
        ),
        "bank": SimpleNamespace(num_units=3),
        "runner": SimpleNamespace(lookahead=True, recorded_prompts=(5, 70)),
        **dict.fromkeys(("tokenizer", "host", "library")),
    }
    loop = Parts(**parts).make_loop(lambda _: None)
    assert loop._scheduler.limits.recorded_prompts == (5, 70)
