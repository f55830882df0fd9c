"""What scores the trainer's experiments: an engine over a base, as ``--scorer`` names it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shoal.server.config import ServeConfig
from shoal.server.evaluating.engine_source import EngineSource
from shoal.server.evaluating.engine_source import open_source as open_engine

# Test prompts are short: many rows at once fill a GPU.
_ROWS = 256
# Enough for a small base, and the rest stays for the training that comes after.
_MEMORY = 0.6


@contextmanager
def open_source(base: Path, device: str) -> Iterator[EngineSource]:
    """An engine over ``base`` to which adapters are added from directories.

    Raises:
        As ``assemble.build``.
    """
    asked = ServeConfig(
        model=str(base),
        device=device,
        max_model_len=1024,
        max_num_seqs=_ROWS,
        max_num_batched_tokens=4096,
        spectral_memory=8 << 30,
        gpu_memory_utilization=_MEMORY,
    )
    with open_engine(asked) as source:
        yield source
