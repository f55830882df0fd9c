"""SVF and SVFT beside the other families, against naive generation with merged weights."""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.e2e.test_mixed_batch import config, generate, running

from shoal.server.assemble import assemble

pytestmark = pytest.mark.usefixtures("own_cache")

Make = Callable[..., object]


def mlp(module: str) -> bool:
    return ".mlp." in module


@pytest.mark.usefixtures("any_runner")
def test_a_mixed_batch_equals_naive_generation(
    tiny: object, make_adapter: Make, tmp_path: Path
) -> None:
    adapters = [
        make_adapter("svf", 1, 0, modules=mlp),
        make_adapter("svft", 3, 1),
        make_adapter("svf", 1, 2, dtype=torch.bfloat16),
        make_adapter("svft", 1, 3, modules=lambda module: "layers.1.self_attn.k" in module),
        make_adapter("lora_xs", 4, 4),
        make_adapter("miss", 7, 5),
        make_adapter("lora", 3, 6),
    ]
    with assemble(config(tiny, tmp_path)) as services:
        infos = [
            services.library.upload(f"a{i}", adapter.files)  # type: ignore[attr-defined]
            for i, adapter in enumerate(adapters)
        ]
        assert [info.family for info in infos] == ["spectral"] * 4 + ["core", "fold", "lora"]
        rng = random.Random(5)
        shared = [rng.randrange(2, 258) for _ in range(21)]
        jobs = []
        for number in range(24):
            tail = [rng.randrange(2, 258) for _ in range(rng.randrange(0, 40))]
            prompt = shared + tail if number % 2 else [*tail, 7, 8]
            jobs.append((number % 8 - 1, prompt, rng.randrange(4, 20)))

        async def all_at_once() -> list[list[int]]:
            async with running(services):
                return await asyncio.gather(
                    *(
                        generate(services, prompt, n, infos[which] if which >= 0 else None, str(i))
                        for i, (which, prompt, n) in enumerate(jobs)
                    )
                )

        got = asyncio.run(all_at_once())
    different = set()
    for (which, prompt, n), tokens in zip(jobs, got, strict=True):
        deltas = adapters[which].deltas if which >= 0 else None  # type: ignore[attr-defined]
        assert tokens == tiny.greedy(prompt, n, deltas), (which, len(prompt))  # type: ignore[attr-defined]
        if tokens != tiny.greedy(prompt, n, None):  # type: ignore[attr-defined]
            different.add(which)
    assert different >= {0, 1, 2, 3}, "each adapter must say something that the base does not"
